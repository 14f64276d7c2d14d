package blob

import (
	"io"

	"github.com/klauspost/compress/zstd"
)

// packer compresses what is written to it, but for stretches that are stored as
// they are: compressing a JPEG again takes CPU on every machine that it passes,
// and gains nothing. Its output is a sequence of zstd frames, which every
// decoder reads as one stream, and depends on nothing but its input.
type packer struct {
	w      io.Writer
	zstd   *zstd.Encoder
	sample *zstd.Encoder
	stored int64 // bytes that are still to be stored
	block  []byte
}

func newPacker(w io.Writer) (*packer, error) {
	// One thread and one level: the bytes depend on nothing but the content.
	z, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(maxWindow))
	if err != nil {
		return nil, err
	}
	sample, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, err
	}
	return &packer{w: w, zstd: z, sample: sample}, nil
}

// A file is stored if samples of its beginning, middle and end shrink by less
// than a thirtieth. Files that are smaller than all samples together are not
// worth a frame of their own.
const (
	sampleBytes = 32 << 10
	minStored   = 4 * sampleBytes
)

// incompressible looks into a file of size bytes. A file that cannot be read
// says so when it is.
func (p *packer) incompressible(f io.ReaderAt, size int64) bool {
	if size < minStored {
		return false
	}
	in, out, packed := make([]byte, sampleBytes), []byte(nil), 0
	for _, at := range []int64{0, (size - sampleBytes) / 2, size - sampleBytes} {
		if _, err := f.ReadAt(in, at); err != nil {
			return false
		}
		out = p.sample.EncodeAll(in, out[:0])
		packed += len(out)
	}
	return packed > 3*sampleBytes*29/30
}

// The parts of a zstd frame (RFC 8878) of unknown size without a checksum, and
// of its raw blocks.
const (
	maxRawBlock  = 128 << 10
	rawLast      = 1
	rawSizeShift = 3
)

// rawFrame is a frame's header: the magic number, no flags, and a window of
// 128 KiB, which is the least that allows blocks of that size.
var rawFrame = []byte{0x28, 0xb5, 0x2f, 0xfd, 0, (17 - 10) << 3}

// store begins a frame that holds the next size bytes, at least one, as they are.
func (p *packer) store(size int64) error {
	if err := p.zstd.Close(); err != nil {
		return err
	}
	p.stored = size
	_, err := p.w.Write(rawFrame)
	return err
}

func (p *packer) Write(b []byte) (n int, err error) {
	for len(b) > 0 && p.stored > 0 {
		take := int(min(int64(len(b)), p.stored, maxRawBlock-int64(len(p.block))))
		p.block = append(p.block, b[:take]...)
		p.stored -= int64(take)
		n += take
		b = b[take:]
		if len(p.block) == maxRawBlock || p.stored == 0 {
			if err := p.flush(); err != nil {
				return n, err
			}
		}
	}
	if len(b) == 0 {
		return n, nil
	}
	m, err := p.zstd.Write(b)
	return n + m, err
}

// flush writes a raw block, and ends the frame with the last one.
func (p *packer) flush() error {
	header := uint32(len(p.block)) << rawSizeShift
	if p.stored == 0 {
		header |= rawLast
	}
	_, err := p.w.Write([]byte{byte(header), byte(header >> 8), byte(header >> 16)})
	if err == nil {
		_, err = p.w.Write(p.block)
	}
	p.block = p.block[:0]
	if p.stored == 0 {
		p.zstd.Reset(p.w)
	}
	return err
}

// Close ends the last frame.
func (p *packer) Close() error { return p.zstd.Close() }
