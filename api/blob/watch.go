package blob

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/musternet/muster/api"
)

// watch ends a transfer that stands still while it should not.
type watch struct {
	idle   time.Duration
	timer  *time.Timer
	cancel context.CancelCauseFunc
	ctx    context.Context
}

var errStalled = errors.New("the connection stood still")

// watchTransfer returns the context of a transfer; the watch begins paused.
func watchTransfer(ctx context.Context, idle time.Duration) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{idle: idle, cancel: cancel, ctx: ctx}
	w.timer = time.AfterFunc(idle, func() { cancel(errStalled) })
	w.pause()
	return ctx, w
}

func (w *watch) begin() { w.timer.Reset(w.idle) }
func (w *watch) pause() { w.timer.Stop() }

// stop releases the watch and ends the transfer.
func (w *watch) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// explain says that the watch made an error happen, if it did.
func (w *watch) explain(err error) error {
	if err != nil && err != io.EOF && context.Cause(w.ctx) == errStalled {
		return api.Errorf(api.Unavailable, "the transfer was cut: not a byte moved for %s", w.idle)
	}
	return err
}

// watchedBody is an answer's body that must not stand still while it is read.
type watchedBody struct {
	io.ReadCloser
	watch *watch
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.watch.begin()
	n, err := b.ReadCloser.Read(p)
	b.watch.pause()
	return n, b.watch.explain(err)
}

func (b *watchedBody) Close() error {
	b.watch.stop()
	return b.ReadCloser.Close()
}
