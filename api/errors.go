package api

import (
	"errors"
	"fmt"
	"net/http"

	"connectrpc.com/connect"
)

// Kind is the class of an error: what the caller can do about it. There is one
// list of kinds and one table from kind to status, both in this file.
type Kind uint8

// The kinds.
const (
	Internal        Kind = iota // a defect or a broken machine; report it
	Invalid                     // the request is wrong; change it
	NotFound                    // nothing has that name
	Conflict                    // the state does not allow it (any more)
	Unauthenticated             // no key, or one that is not known
	Denied                      // a known key that may not do this
	Exhausted                   // a quota, a budget or a bound was reached
	TooLarge                    // more bytes than the limit allows
	Unsupported                 // valid, and nothing here can do it
	Unavailable                 // not now; the same call may work later
)

var kinds = [...]struct {
	name string
	code connect.Code
	http int
}{
	Internal:        {"internal", connect.CodeInternal, http.StatusInternalServerError},
	Invalid:         {"invalid", connect.CodeInvalidArgument, http.StatusBadRequest},
	NotFound:        {"not found", connect.CodeNotFound, http.StatusNotFound},
	Conflict:        {"conflict", connect.CodeFailedPrecondition, http.StatusConflict},
	Unauthenticated: {"unauthenticated", connect.CodeUnauthenticated, http.StatusUnauthorized},
	Denied:          {"denied", connect.CodePermissionDenied, http.StatusForbidden},
	Exhausted:       {"exhausted", connect.CodeResourceExhausted, http.StatusTooManyRequests},
	TooLarge:        {"too large", connect.CodeOutOfRange, http.StatusRequestEntityTooLarge},
	Unsupported:     {"unsupported", connect.CodeUnimplemented, http.StatusNotImplemented},
	Unavailable:     {"unavailable", connect.CodeUnavailable, http.StatusServiceUnavailable},
}

func (k Kind) String() string {
	if int(k) < len(kinds) {
		return kinds[k].name
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// HTTP is the status that a plain HTTP answer of this kind carries.
func (k Kind) HTTP() int { return kinds[k].http }

// KindOfHTTP is the reverse of Kind.HTTP; an unknown status is Internal.
func KindOfHTTP(status int) Kind {
	for k, row := range kinds {
		if row.http == status {
			return Kind(k)
		}
	}
	return Internal
}

// Error is an error with a kind. Its message says what was wrong, with the
// value, and what to do.
type Error struct {
	Kind Kind
	Msg  string
	Err  error // the cause; may be nil
}

func (e *Error) Error() string { return e.Msg }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error of a kind; %w keeps the cause.
func Errorf(kind Kind, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: kind, Msg: err.Error(), Err: errors.Unwrap(err)}
}

// KindOf is the kind of the first Error, or Connect error, in err's chain, and
// Internal for any other error.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		if ce.Code() == connect.CodeInvalidArgument && !connect.IsWireError(ce) {
			return Unavailable // no answer: an answer that was cut off, as by the server's death
		}
		for k, row := range kinds {
			if row.code == ce.Code() {
				return Kind(k)
			}
		}
		if ce.Code() == connect.CodeDeadlineExceeded {
			return Unavailable
		}
	}
	return Internal
}

// ToConnect gives err the RPC status of its kind. It keeps Connect errors as
// they are.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		return err
	}
	return connect.NewError(kinds[KindOf(err)].code, err)
}

// FromConnect turns an error of an RPC back into one with a kind and a message
// without the protocol's prefix. One that was turned already keeps what was
// said about it since.
func FromConnect(err error) error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		switch e := e.(type) {
		case *Error:
			return err
		case *connect.Error:
			return &Error{Kind: KindOf(e), Msg: e.Message(), Err: err}
		}
	}
	return err
}
