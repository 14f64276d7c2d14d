package blob

import (
	"context"
	"fmt"

	"github.com/musternet/muster/api"
)

// stager is a store that takes a blob in parts and hears its digest last.
type stager interface {
	stage(ctx context.Context) (staged, error)
}

var (
	_ stager = (*Dir)(nil)
	_ stager = (*Memory)(nil)
	_ stager = (*Replicated)(nil)
	_ stager = (*HTTP)(nil)
)

// staged is a blob on its way into a store. It is for one caller at a time.
type staged interface {
	// append adds the bytes of in, hashing them on the way. Where in fails, what
	// came before stays, and the next append goes on from length. Any other
	// error, in.failed is nil then, leaves nothing that could become the blob:
	// append and commit must fail from then on.
	append(in *intake) error
	length() int64
	// commit stores what came, as Put does: durable once it returns nil, and
	// nothing under any name if the bytes do not have the digest.
	commit(ctx context.Context, digest api.Digest) error
	// discard gives up what was not committed. It follows every commit too.
	discard()
}

// putStaged is Put for a store that stages.
func putStaged(ctx context.Context, store interface {
	stager
	Stat(ctx context.Context, digest api.Digest) (int64, error)
}, digest api.Digest, in *intake) (int64, error) {
	if size, err := store.Stat(ctx, digest); api.KindOf(err) != api.NotFound {
		return size, err
	}
	s, err := store.stage(ctx)
	if err != nil {
		return 0, err
	}
	defer s.discard()
	if err := s.append(in); err != nil {
		return 0, fmt.Errorf("blob %s: %w", digest, err)
	}
	return s.length(), s.commit(ctx, digest)
}
