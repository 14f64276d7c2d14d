package server

import (
	"net/http"
	"time"
)

// sessionWrite is how long a worker may leave a message untaken. A stream that
// nobody reads would keep its session, and what waits for it, for good.
const sessionWrite = 30 * time.Second

// writesWithin gives each write of an answer its own deadline, and an answer
// that goes on none.
func writesWithin(d time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(&deadlineWriter{w, http.NewResponseController(w), d}, r)
	})
}

type deadlineWriter struct {
	http.ResponseWriter
	control *http.ResponseController
	within  time.Duration
}

func (w *deadlineWriter) Write(p []byte) (int, error) {
	defer w.limit()()
	return w.ResponseWriter.Write(p)
}

// Flush implements http.Flusher; a stream is nothing without it.
func (w *deadlineWriter) Flush() {
	defer w.limit()()
	_ = w.control.Flush() // the next write says what is wrong
}

// Unwrap is for http.ResponseController.
func (w *deadlineWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// limit sets the deadline until the answer is called. A connection that knows
// no deadlines goes without.
func (w *deadlineWriter) limit() (lift func()) {
	_ = w.control.SetWriteDeadline(time.Now().Add(w.within))
	return func() { _ = w.control.SetWriteDeadline(time.Time{}) }
}
