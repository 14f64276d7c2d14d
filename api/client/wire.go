package client

import (
	"fmt"

	"connectrpc.com/connect"
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
		if r, ok := message.(interface{ Reset() }); ok {
			r.Reset()
		}
		return m.UnmarshalVT(data)
	case proto.Message:
		return proto.Unmarshal(data, m)
	}
	return fmt.Errorf("%T is no protobuf message", message)
}
