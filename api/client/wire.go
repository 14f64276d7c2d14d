package client

import (
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// compressFrom is from how many bytes on a message is compressed. A heartbeat or
// a handful of orders would cost more time than it saves.
const compressFrom = 16 << 10

// Compression is for both sides of every call: what is small is not compressed.
func Compression() connect.Option { return connect.WithCompressMinBytes(compressFrom) }

// SessionWire is how both sides of a worker's session write: encoded without
// reflection, too. Strings come as they are: unlike connect's own codec, this one
// does not refuse text that is no UTF-8, so the scheduler does where it keeps any.
func SessionWire() connect.Option {
	return connect.WithOptions(connect.WithCodec(codec{}), Compression())
}

// codec takes the place of connect's own for protobuf. The bytes are the same.
type codec struct{}

var _ connect.Codec = codec{}

// generated is what the messages of api/musterpb have.
type generated interface {
	SizeVT() int
	MarshalToSizedBufferVT([]byte) (int, error)
	UnmarshalVT([]byte) error
}

func (codec) Name() string { return "proto" }

func (c codec) Marshal(message any) ([]byte, error) { return c.MarshalAppend(nil, message) }

// MarshalAppend lets connect use its buffers again.
func (codec) MarshalAppend(dst []byte, message any) ([]byte, error) {
	switch m := message.(type) {
	case generated:
		size := m.SizeVT()
		if free := cap(dst) - len(dst); free < size {
			dst = append(make([]byte, 0, len(dst)+size), dst...)
		}
		end := len(dst) + size
		_, err := m.MarshalToSizedBufferVT(dst[len(dst):end])
		return dst[:end], err
	case proto.Message:
		return proto.MarshalOptions{}.MarshalAppend(dst, m)
	}
	return nil, fmt.Errorf("%T is no protobuf message", message)
}

func (codec) Unmarshal(data []byte, message any) error {
	switch m := message.(type) {
	case generated:
		if n := countFields(data, 3, maxFields); n > maxFields {
			return fmt.Errorf("a message of more than %d fields", maxFields)
		}
		if r, ok := message.(interface{ Reset() }); ok {
			r.Reset()
		}
		return m.UnmarshalVT(data)
	case proto.Message:
		return proto.Unmarshal(data, m)
	}
	return fmt.Errorf("%T is no protobuf message", message)
}

// maxFields bounds the fields of a message, with those of what it holds: two
// bytes are enough for an empty message that takes hundreds once it is decoded.
const maxFields = 1 << 16

// countFields counts the fields of an encoded message, and below it as deep as
// it is told, until there are more than a limit. Bytes that are no message count
// as what they can be read as; those that can't be read count no further.
func countFields(data []byte, depth, limit int) (n int) {
	for len(data) > 0 && n <= limit {
		_, kind, tag := protowire.ConsumeTag(data)
		if tag < 0 {
			return n
		}
		size := protowire.ConsumeFieldValue(1, kind, data[tag:])
		if size < 0 {
			return n
		}
		n++
		if kind == protowire.BytesType && depth > 1 {
			value, _ := protowire.ConsumeBytes(data[tag:])
			n += countFields(value, depth-1, limit-n)
		}
		data = data[tag+size:]
	}
	return n
}
