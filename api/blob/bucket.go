package blob

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"path/filepath"
	"time"

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
		bucket, err := new(s3blob.URLOpener).OpenBucketURL(ctx, u)
		if err != nil {
			return nil, nil, api.Errorf(api.Invalid, "blob store %q: %w", rawURL, err)
		}
		return NewBucket(bucket), bucket.Close, nil
	}
	return nil, nil, api.Errorf(api.Invalid, "blob store %q: want file:///…, s3://… or mem://", rawURL)
}

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
