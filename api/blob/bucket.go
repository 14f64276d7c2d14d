package blob

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"gocloud.dev/blob"
	"gocloud.dev/blob/s3blob"
	"gocloud.dev/gcerrors"

	"github.com/musternet/muster/api"
)

// retryDelay is how long a remote reader waits before its second try.
const retryDelay = 200 * time.Millisecond

// Bucket is a store in a bucket of an object store. Its objects have the names
// that Dir gives its files.
type Bucket struct {
	bucket *blob.Bucket
	delay  time.Duration
	// signsGets says that readers may be sent to URLs of the object store,
	// signsPuts that writers may: then the store itself refuses bytes that do not
	// have the SHA-256 which the URL was signed for.
	signsGets, signsPuts bool
}

var _ Store = (*Bucket)(nil)

// NewBucket is the store in bucket, which stays the caller's to close.
func NewBucket(bucket *blob.Bucket) *Bucket { return &Bucket{bucket: bucket, delay: retryDelay} }

// OpenURL opens the store that a URL names, and returns what closes it:
//
//	file:///var/lib/muster/blobs   a directory
//	mem://                         memory, for tests
//	s3://bucket?region=eu-west-1   a bucket of S3 or of a compatible service,
//	                               with endpoint=, use_path_style= and the other
//	                               parameters of gocloud.dev/blob/s3blob
//
// Customers and workers are sent to S3 itself, with URLs that expire. The
// parameter direct=off keeps it out of their sight; direct=get lets them read
// only, which is the default for a service with an endpoint= of its own; direct=on
// lets them write too, and says that the service checks x-amz-checksum-sha256 as
// Amazon's does. A service that does not must not be named so.
func OpenURL(ctx context.Context, rawURL string) (Store, func() error, error) {
	nothing := func() error { return nil }
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, nil, api.Errorf(api.Invalid, "blob store: %w", err)
	}
	switch u.Scheme {
	case "file":
		if u.Host != "" || !filepath.IsAbs(u.Path) {
			return nil, nil, api.Errorf(api.Invalid, "blob store %q: want file:/// and an absolute path", rawURL)
		}
		dir, err := NewDir(filepath.FromSlash(u.Path))
		return dir, nothing, err
	case "mem":
		return &Memory{}, nothing, nil
	case s3blob.Scheme:
		gets, puts, err := direct(u)
		if err != nil {
			return nil, nil, api.Errorf(api.Invalid, "blob store %q: %w", rawURL, err)
		}
		bucket, err := new(s3blob.URLOpener).OpenBucketURL(ctx, u)
		if err != nil {
			return nil, nil, api.Errorf(api.Invalid, "blob store %q: %w", rawURL, err)
		}
		b := NewBucket(bucket)
		b.signsGets, b.signsPuts = gets, puts
		return b, bucket.Close, nil
	}
	return nil, nil, api.Errorf(api.Invalid, "blob store %q: want file:///…, s3://… or mem://", rawURL)
}

// direct takes our own parameter out of the URL of a bucket.
func direct(u *url.URL) (gets, puts bool, err error) {
	query := u.Query()
	mode := query.Get("direct")
	query.Del("direct")
	u.RawQuery = query.Encode()
	switch mode {
	case "":
		return true, !query.Has("endpoint") && !query.Has("hostname_immutable"), nil
	case "on":
		return true, true, nil
	case "get":
		return true, false, nil
	case "off":
		return false, false, nil
	}
	return false, false, fmt.Errorf("direct=%s: want on, get or off", mode)
}

// signedFor is how long a signed URL works for beginning a transfer.
const signedFor = 15 * time.Minute

// maxSignedPut is what S3 takes in one request.
const maxSignedPut = 5 << 30

// ticket is a request that stores or returns a blob without passing through a
// scheduler.
type ticket struct {
	URL    string            `json:"url"`
	Header map[string]string `json:"header,omitempty"`
}

// signGet returns a URL of the blob's bytes.
func (b *Bucket) signGet(ctx context.Context, digest api.Digest) (string, error) {
	if !b.signsGets {
		return "", errNotDirect
	}
	if _, err := b.Stat(ctx, digest); err != nil {
		return "", err
	}
	signed, err := b.bucket.SignedURL(ctx, b.key(digest), &blob.SignedURLOptions{Method: http.MethodGet, Expiry: signedFor})
	if gcerrors.Code(err) == gcerrors.Unimplemented {
		return "", errNotDirect
	} else if err != nil {
		return "", b.err(digest, err)
	}
	return signed, nil
}

// signPut returns a request that stores the blob and nothing else under its
// name: the checksum is signed, so the object store compares it with what comes.
func (b *Bucket) signPut(ctx context.Context, digest api.Digest, size int64) (ticket, error) {
	if !b.signsPuts || size > maxSignedPut {
		return ticket{}, errNotDirect
	}
	checksum := base64.StdEncoding.EncodeToString(digest.Sum())
	set := false
	signed, err := b.bucket.SignedURL(ctx, b.key(digest), &blob.SignedURLOptions{
		Method: http.MethodPut, Expiry: signedFor,
		BeforeSign: func(as func(any) bool) error {
			var in *s3.PutObjectInput
			if set = as(&in); set {
				in.ChecksumSHA256, in.ContentLength = &checksum, &size
			}
			return nil
		},
	})
	switch {
	case gcerrors.Code(err) == gcerrors.Unimplemented:
		return ticket{}, errNotDirect
	case err != nil:
		return ticket{}, b.err(digest, err)
	case !set || !signsChecksum(signed):
		return ticket{}, errNotDirect // anything could be put there
	}
	return ticket{signed, map[string]string{checksumHeader: checksum}}, nil
}

const checksumHeader = "X-Amz-Checksum-Sha256"

// signsChecksum reports whether the checksum is among the headers that a URL
// was signed with, which S3 insists on.
func signsChecksum(signed string) bool {
	u, err := url.Parse(signed)
	if err != nil {
		return false
	}
	return slices.Contains(strings.Split(u.Query().Get("X-Amz-SignedHeaders"), ";"), strings.ToLower(checksumHeader))
}

var errNotDirect = api.Errorf(api.Unsupported, "blobs of this store pass through the scheduler")

func (b *Bucket) key(digest api.Digest) string {
	hex := digest.Hex()
	return hex[:2] + "/" + hex
}

// Put implements Store. The object appears when its writer is closed, so wrong
// bytes are dropped by cancelling the writer before.
func (b *Bucket) Put(ctx context.Context, digest api.Digest, r io.Reader, limit int64) (int64, error) {
	if size, err := b.Stat(ctx, digest); api.KindOf(err) != api.NotFound {
		return size, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := b.bucket.NewWriter(ctx, b.key(digest), &blob.WriterOptions{
		ContentType:                 "application/octet-stream",
		DisableContentTypeDetection: true,
	})
	if err != nil {
		return 0, b.err(digest, err)
	}
	in := newIntake(ctx, r, limit)
	err = in.copyTo(w)
	if in.failed != nil {
		err = fmt.Errorf("blob %s: %w", digest, in.failed)
	} else if err != nil {
		err = b.err(digest, err)
	} else {
		err = in.verify(digest)
	}
	if err != nil {
		cancel()
		w.Close()
		return 0, err
	}
	if err := w.Close(); err != nil {
		return 0, b.err(digest, err)
	}
	return in.size, nil
}

// Open implements Store.
func (b *Bucket) Open(ctx context.Context, digest api.Digest) (Reader, error) {
	size, err := b.Stat(ctx, digest)
	if err != nil {
		return nil, err
	}
	open := func(ctx context.Context, offset, length int64) (io.ReadCloser, error) {
		r, err := b.bucket.NewRangeReader(ctx, b.key(digest), offset, length, nil)
		if err != nil {
			return nil, b.err(digest, err)
		}
		return r, nil
	}
	return newRanged(ctx, digest, size, b.delay, open), nil
}

// Stat implements Store.
func (b *Bucket) Stat(ctx context.Context, digest api.Digest) (int64, error) {
	if err := checkDigest(digest); err != nil {
		return 0, err
	}
	attributes, err := b.bucket.Attributes(ctx, b.key(digest))
	if err != nil {
		return 0, b.err(digest, err)
	}
	return attributes.Size, nil
}

// Delete implements Store.
func (b *Bucket) Delete(ctx context.Context, digest api.Digest) error {
	if err := checkDigest(digest); err != nil {
		return err
	}
	err := b.bucket.Delete(ctx, b.key(digest))
	if err == nil || gcerrors.Code(err) == gcerrors.NotFound {
		return nil
	}
	return b.err(digest, err)
}

// err gives an error of the object store a kind. Whatever is not about the
// object may pass once the service or its configuration is mended.
func (b *Bucket) err(digest api.Digest, err error) error {
	if gcerrors.Code(err) == gcerrors.NotFound {
		return notFound(digest)
	}
	return api.Errorf(api.Unavailable, "blob %s: the object store failed: %w", digest, err)
}
