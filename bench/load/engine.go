package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// engine is a Docker engine, spoken to by plain HTTP: what it is compared with
// must not pass through muster's own code.
type engine struct{ http *http.Client }

const engineSocket = "/var/run/docker.sock"

// openEngine finds the engine of this machine.
func openEngine(ctx context.Context) (*engine, error) {
	socket := engineSocket
	if host := os.Getenv("DOCKER_HOST"); host != "" {
		path, ok := strings.CutPrefix(host, "unix://")
		if !ok {
			return nil, skipped("DOCKER_HOST=" + host + " is no engine of this machine")
		}
		socket = path
	}
	e := &engine{&http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := e.call(ctx, http.MethodGet, "/_ping", nil, nil); err != nil {
		return nil, skipped(fmt.Sprintf("no Docker engine answers here (%v); deploy/dev/docker-engine.sh starts one", err))
	}
	return e, nil
}

// call makes one call; in and out are JSON, or nil.
func (e *engine) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	switch {
	case err != nil:
		return err
	case resp.StatusCode >= 300:
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text))
	case out == nil:
		return nil
	}
	return json.Unmarshal(text, out)
}

// event is the start or the end of a container, by the engine's clock, which is
// this machine's.
type event struct {
	Action   string
	TimeNano int64 `json:"timeNano"`
	Actor    struct {
		ID         string
		Attributes map[string]string
	}
}

// events brings the starts and ends of containers until ctx ends.
func (e *engine) events(ctx context.Context) (<-chan event, error) {
	filters := url.QueryEscape(`{"type":["container"],"event":["start","die"]}`)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine/events?filters="+filters, nil)
	if err != nil {
		return nil, err
	}
	resp, err := e.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, errors.Join(fmt.Errorf("the engine's events: %s", resp.Status), resp.Body.Close())
	}
	out := make(chan event, 1024)
	go func() {
		defer close(out)
		defer resp.Body.Close()
		for d := json.NewDecoder(resp.Body); ; {
			var ev event
			if d.Decode(&ev) != nil {
				return // ctx ended, or the engine did
			}
			out <- ev
		}
	}()
	return out, nil
}

// eventWithin is how long a container may take to start or to end.
const eventWithin = 30 * time.Second

// next is the next event of a kind.
func next(ctx context.Context, events <-chan event, action string) (event, error) {
	timer := time.NewTimer(eventWithin)
	defer timer.Stop()
	for {
		select {
		case ev, ok := <-events:
			if !ok {
				return event{}, errors.New("the engine sends no more events")
			}
			if ev.Action == action {
				return ev, nil
			}
		case <-timer.C:
			return event{}, fmt.Errorf("no container's %s within %s", action, eventWithin)
		case <-ctx.Done():
			return event{}, ctx.Err()
		}
	}
}
