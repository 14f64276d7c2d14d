package server

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/musternet/muster/api/client"
)

// A client that does not read holds nobody up; one that waits long between two
// messages loses nothing.
func TestWritesWithin(t *testing.T) {
	t.Parallel()
	const within = time.Second
	failed := make(chan error, 1)
	srv := httptest.NewUnstartedServer(writesWithin(within, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/idle" {
			_, _ = w.Write([]byte("a"))
			w.(http.Flusher).Flush()
			<-time.After(3 * within)
			_, err := w.Write([]byte("b"))
			failed <- err
			return
		}
		for {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				failed <- err
				return
			}
		}
	})))
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	defer srv.Close()
	h := &http.Client{Transport: client.NewTransport()}
	defer h.CloseIdleConnections()
	for path, wantError := range map[string]bool{"/idle": false, "/flood": true} {
		resp, err := h.Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-failed:
			if (err != nil) != wantError {
				t.Errorf("%s: %v", path, err)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the write hangs", path)
		}
		resp.Body.Close()
	}
}
