package outputs

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/musternet/muster/api"
)

// maxWindow bounds the memory that reading a frame takes; every frame that
// Write makes stays within it.
const maxWindow = 8 << 20

// maxSmall bounds the tar of an item that is packed and unpacked in one piece of
// memory. It is the size of a zstd block: up to here a compressor needs no window
// and a decompressor no history, which is what makes an item of a few bytes cost
// microseconds and not the allocation of megabytes.
const maxSmall = 128 << 10

// maxTiny bounds the tar of an item whose few literal bytes are not worth the
// tables of an entropy coder: a frame becomes some tens of bytes longer, and takes
// half the time on both sides.
const maxTiny = 2 << 10

// smallEncoder packs small frames. It is kept for the next one, its memory too.
type smallEncoder struct {
	small, tiny *zstd.Encoder
	tar, frame  []byte
	files       []fileDigest
}

var smallEncoders = sync.Pool{New: func() any {
	options := []zstd.EOption{
		zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxSmall),
		zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithLowerEncoderMem(true),
	}
	// No errors: the options are constants.
	small, _ := zstd.NewWriter(nil, options...)
	tiny, _ := zstd.NewWriter(nil, append(options, zstd.WithNoEntropyCompression(true))...)
	return &smallEncoder{small: small, tiny: tiny}
}}

// compress returns the frame of e.tar, valid until e is used again.
func (e *smallEncoder) compress() []byte {
	z := e.small
	if len(e.tar) <= maxTiny {
		z = e.tiny
	}
	e.frame = z.EncodeAll(e.tar, e.frame[:0])
	return e.frame
}

// add appends a file to e.tar.
func (e *smallEncoder) add(ctx context.Context, s source) (fileDigest, error) {
	out := (*sliceWriter)(&e.tar)
	if isPlain(s.path, s.size) {
		e.tar = appendPlain(e.tar, s.path, s.size)
	} else if err := tar.NewWriter(out).WriteHeader(fileHeader(s.path, s.size)); err != nil {
		return fileDigest{}, diskError(err)
	}
	start := len(e.tar)
	if s.open == nil {
		e.tar = append(e.tar, s.data...)
	} else if err := s.copyTo(ctx, out); err != nil {
		return fileDigest{}, err
	}
	sum := sha256.Sum256(e.tar[start:])
	e.tar = append(e.tar, zeroBlocks[:padding(s.size)]...)
	return fileDigest{s.path, s.size, sum}, nil
}

// sliceWriter is a bytes.Buffer that gives its slice away.
type sliceWriter []byte

func (s *sliceWriter) Write(p []byte) (int, error) {
	*s = append(*s, p...)
	return len(p), nil
}

// streamEncoders holds *zstd.Encoder for frames of any size. One has 20 MB of
// tables and window, so a task of a thousand frames takes one, not a thousand.
var streamEncoders = sync.Pool{New: func() any {
	z, _ := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxWindow), zstd.WithEncoderLevel(zstd.SpeedDefault))
	return z
}}

// smallDecoder unpacks small frames.
type smallDecoder struct {
	zstd    *zstd.Decoder
	in, out []byte
	files   []plainFile
	digests []fileDigest
}

var smallDecoders = sync.Pool{New: func() any {
	z, _ := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true),
		zstd.WithDecodeAllCapLimit(true))
	return &smallDecoder{zstd: z}
}}

// streamDecoders holds *zstd.Decoder for frames of any size. With a concurrency
// of one they have no goroutines, so one that the pool drops leaves nothing.
var streamDecoders = sync.Pool{New: func() any {
	z, _ := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
	return z
}}

// errTooMuch is what a decompression bomb gets.
var errTooMuch = errors.New("it unpacks to more than the manifest declares")

// isSmall says whether a frame of length bytes that may unpack to most is read
// in one piece. Both come from the worker: they bound memory, nothing more.
func isSmall(length, most int64) bool { return length <= maxSmall && most <= maxSmall }

// unpack reads length bytes of r and decompresses them into at most most bytes,
// valid until d is used again. Whole is false for a frame that is damaged, cut
// short or unpacks to more; an error is the store's.
func (d *smallDecoder) unpack(r io.ReaderAt, offset, length, most int64) (unpacked []byte, whole bool, err error) {
	d.in = grown(d.in, length)
	n, err := r.ReadAt(d.in, offset)
	if n < len(d.in) {
		if err == nil || err == io.EOF {
			return nil, false, nil
		}
		return nil, false, err
	}
	d.out = grown(d.out, most)
	unpacked, err = d.zstd.DecodeAll(d.in, d.out[:0:most])
	return unpacked, err == nil, nil
}

func grown(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		b = make([]byte, n)
	}
	return b[:n]
}

// stream takes a decoder out of the pool for r; release gives it back.
func stream(r io.Reader) (z *zstd.Decoder, release func(), err error) {
	z = streamDecoders.Get().(*zstd.Decoder)
	if err := z.Reset(r); err != nil {
		return nil, nil, api.Errorf(api.Internal, "zstd: %w", err)
	}
	return z, func() {
		// Without its source: the pool must not keep an archive alive.
		if z.Reset(nil) == nil {
			streamDecoders.Put(z)
		}
	}, nil
}
