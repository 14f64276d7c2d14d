package main

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
)

// The weights file, all numbers little-endian:
//
//	magic    8 bytes, "tinylm1\n"
//	shape    7 uint32: vocab, dim, layers, heads, kv heads, hidden, context
//	weights  float32 each, in the order of newWeights: the embedding; per layer
//	         attnNorm, wq, wk, wv, wo, ffnNorm, w1, w3, w2; the last norm
//	sum      SHA-256 of everything before it
const (
	magic           = "tinylm1\n"
	headerBytes     = len(magic) + 7*4
	maxWeightsBytes = 64 << 20
)

//go:embed weights.bin
var trainedWeights []byte

func (c *config) fields() []*int {
	return []*int{&c.Vocab, &c.Dim, &c.Layers, &c.Heads, &c.KVHeads, &c.Hidden, &c.Context}
}

func encodeWeights(w *weights[float32]) []byte {
	b := []byte(magic)
	for _, f := range w.fields() {
		b = binary.LittleEndian.AppendUint32(b, uint32(*f))
	}
	for _, v := range w.all {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

// decodeWeights reads a weights file, which may come from anyone: it allocates
// no more than the file itself justifies.
func decodeWeights(b []byte) (*weights[float32], error) {
	if !bytes.HasPrefix(b, []byte(magic)) {
		return nil, fmt.Errorf("not a weights file: it starts with %q, want %q", b[:min(len(b), len(magic))], magic)
	}
	if len(b) < headerBytes+sha256.Size {
		return nil, fmt.Errorf("weights file of %d bytes is cut short", len(b))
	}
	var c config
	for i, f := range c.fields() {
		*f = int(binary.LittleEndian.Uint32(b[len(magic)+4*i:]))
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("weights file: %w", err)
	}
	if want := headerBytes + 4*c.parameters() + sha256.Size; len(b) != want {
		return nil, fmt.Errorf("weights file has %d bytes: its shape needs %d", len(b), want)
	}
	body, sum := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if sha256.Sum256(body) != [sha256.Size]byte(sum) {
		return nil, errors.New("weights file is damaged: its checksum does not fit")
	}
	w := newWeights[float32](c)
	for i := range w.all {
		v := math.Float32frombits(binary.LittleEndian.Uint32(body[headerBytes+4*i:]))
		// The bound keeps sums of products, and so every score, finite.
		if !(v >= -1e3 && v <= 1e3) {
			return nil, fmt.Errorf("weights file: weight %d is %v: want -1000 to 1000", i, v)
		}
		w.all[i] = v
	}
	return w, nil
}

// loadWeights reads the file at path; empty means the weights in this program.
func loadWeights(path string) (*weights[float32], error) {
	if path == "" {
		return decodeWeights(trainedWeights)
	}
	b, err := readBounded(path, maxWeightsBytes)
	if err != nil {
		return nil, err
	}
	w, err := decodeWeights(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return w, nil
}

func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return b, nil
}
