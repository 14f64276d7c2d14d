// Package client talks to a muster cluster from Go. Any scheduler takes any
// call; the client goes to another when one does not answer, and repeats what
// is safe to repeat.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
)

// HeaderLeader carries the leader's API address in an answer of a scheduler
// that does not lead.
const HeaderLeader = "Muster-Leader"

// Config says where the cluster is.
type Config struct {
	Addresses []string // "host:port" of one scheduler or more
	Key       string   // API key
	// Patience is how long a call looks for a scheduler that answers. Default
	// 15 s: longer than an election. Where nobody even listens, a fifth of it.
	Patience time.Duration
}

// Client is a connection to a cluster. It is safe for concurrent use.
type Client struct {
	musterpbconnect.MusterClient
	config Config
	blobs  *blob.HTTP
}

// New makes a client; it does not call the cluster yet.
func New(cfg Config) (*Client, error) {
	if len(cfg.Addresses) == 0 {
		return nil, api.Errorf(api.Invalid, "no scheduler address is given")
	}
	if cfg.Patience == 0 {
		cfg.Patience = 15 * time.Second
	}
	base := NewTransport()
	c := &Client{config: cfg}
	c.blobs = Blobs(&http.Client{Transport: NewBlobTransport()}, cfg.Key, func() []string { return cfg.Addresses })
	rpc := &http.Client{Transport: &failover{base: base, addresses: cfg.Addresses, patience: cfg.Patience}}
	c.MusterClient = musterpbconnect.NewMusterClient(rpc, BaseURL(cfg.Addresses[0]), Bearer(cfg.Key), Compression())
	return c, nil
}

// NewID is an ID for a request that may be repeated.
func NewID() string { return strings.ToLower(rand.Text()) }

// Watched completes a message of WatchJob, which leaves out the specification
// and the key of a job that were sent before. Last is the job of the message
// before, nil for a stream's first.
func Watched(last, next *musterpb.Job) *musterpb.Job {
	if last != nil && next.Spec == nil {
		next.Spec, next.PermutationKey = last.Spec, last.PermutationKey
	}
	return next
}

// Detail is a job with all of its attempts and checks, which come page by page.
func (c *Client) Detail(ctx context.Context, job string) (*musterpb.GetJobResponse, error) {
	var all *musterpb.GetJobResponse
	for after := uint32(0); ; {
		page, err := c.GetJob(ctx, connect.NewRequest(&musterpb.GetJobRequest{Job: job, Detail: true, AfterTask: after}))
		if err != nil {
			return nil, err
		}
		if all == nil {
			all = page.Msg
		} else {
			all.Attempts, all.Checks = append(all.Attempts, page.Msg.Attempts...), append(all.Checks, page.Msg.Checks...)
		}
		if after = page.Msg.NextTask; after == 0 {
			break
		}
	}
	all.NextTask = 0
	InOrder(all.Attempts, all.Checks)
	return all, nil
}

// InOrder sorts a job's attempts by when they were placed, and its checks,
// which are in order of their tasks, by when they were opened.
func InOrder(attempts []*musterpb.Attempt, checks []*musterpb.Check) {
	slices.SortStableFunc(attempts, func(a, b *musterpb.Attempt) int {
		return cmp.Or(cmp.Compare(a.PlacedUnixMs, b.PlacedUnixMs), cmp.Compare(a.Hold, b.Hold))
	})
	slices.SortStableFunc(checks, func(a, b *musterpb.Check) int { return cmp.Compare(a.OpenedUnixMs, b.OpenedUnixMs) })
}

// BaseURL is the URL of a scheduler's API address.
func BaseURL(address string) string {
	if strings.Contains(address, "://") {
		return strings.TrimSuffix(address, "/")
	}
	return "http://" + address
}

// Blobs is the cluster's blob store.
func (c *Client) Blobs() *blob.HTTP { return c.blobs }

// Blobs is the blob store behind schedulers' addresses.
func Blobs(h *http.Client, key string, addresses func() []string) *blob.HTTP {
	return blob.NewHTTP(blob.HTTPConfig{
		Client: h,
		Addresses: func() []string {
			var urls []string
			for _, a := range addresses() {
				urls = append(urls, BaseURL(a))
			}
			return urls
		},
		Authorization: func(context.Context) (string, error) { return "Bearer " + key, nil },
	})
}

// Bearer sends an API key with every call.
func Bearer(key string) connect.ClientOption {
	return connect.WithInterceptors(bearer(key))
}

type bearer string

func (b bearer) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		req.Header().Set("Authorization", "Bearer "+string(b))
		return next(ctx, req)
	}
}

func (b bearer) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		conn.RequestHeader().Set("Authorization", "Bearer "+string(b))
		return conn
	}
}

func (b bearer) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// dialWithin bounds one dial, so that an address that swallows packets leaves
// time for the others.
const dialWithin = 3 * time.Second

// NewTransport is the HTTP transport between muster's parts: HTTP/2 without
// TLS, with pings that find a dead connection within 15 seconds.
func NewTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = nil
	t.DialContext = (&net.Dialer{Timeout: dialWithin, KeepAlive: 30 * time.Second}).DialContext
	t.Protocols = new(http.Protocols)
	t.Protocols.SetUnencryptedHTTP2(true)
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second}
	return t
}

// NewBlobTransport is the HTTP transport for blobs: HTTP/1.1, where a transfer
// has a connection of its own. In HTTP/2 as net/http has it, frames of 16 KiB
// and two windows of flow control take three times the CPU, and a large transfer
// delays the calls that share its connection. Probes find a dead connection that
// waits for an answer within half a minute; a transfer that stands still is the
// store's to notice.
func NewBlobTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.Proxy = nil
	t.DialContext = (&net.Dialer{Timeout: dialWithin, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3,
	}}).DialContext
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	t.DisableCompression = true
	t.MaxIdleConnsPerHost, t.MaxConnsPerHost = 8, 64
	t.IdleConnTimeout = 30 * time.Second
	return t
}

// Session dials a worker's session to one scheduler.
func Session(ctx context.Context, h *http.Client, address, key string) *connect.BidiStreamForClient[musterpb.WorkerMessage, musterpb.SchedulerMessage] {
	return musterpbconnect.NewSessionsClient(h, BaseURL(address), Bearer(key), SessionWire()).Session(ctx)
}

// failover sends a request to the scheduler that answered last, and to the
// others in turn while none answers. It repeats requests: they have IDs where
// a repeat would matter.
type failover struct {
	base      http.RoundTripper
	addresses []string
	patience  time.Duration
	last      atomic.Uint32
}

// maxRequestBytes bounds what is kept for a repeat.
const maxRequestBytes = 8 << 20

func (f *failover) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		var err error
		body, err = io.ReadAll(io.LimitReader(req.Body, maxRequestBytes+1))
		req.Body.Close()
		if err != nil {
			return nil, err
		}
		if len(body) > maxRequestBytes {
			return nil, api.Errorf(api.TooLarge, "the request has more than %d bytes", maxRequestBytes)
		}
	}
	began := time.Now()
	var failed error
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		patience := f.patience / 5
		for range f.addresses {
			at := f.last.Load()
			resp, err := f.try(req, f.addresses[int(at)%len(f.addresses)], body)
			if err == nil {
				return resp, nil
			}
			failed = err
			if req.Context().Err() != nil {
				return nil, req.Context().Err()
			}
			f.last.CompareAndSwap(at, at+1)
			if !errors.Is(err, syscall.ECONNREFUSED) {
				patience = f.patience
			}
			if time.Since(began) > f.patience {
				break
			}
		}
		if time.Since(began)+wait > patience {
			return nil, api.Errorf(api.Unavailable, "no scheduler answers at %s: %w", strings.Join(f.addresses, ", "), failed)
		}
		select {
		case <-time.After(wait/2 + mrand.N(wait)):
		case <-req.Context().Done():
			return nil, req.Context().Err()
		}
	}
}

// try sends a request to one address; an answer that says "not now" is an
// error.
func (f *failover) try(req *http.Request, address string, body []byte) (*http.Response, error) {
	r := req.Clone(req.Context())
	base, err := r.URL.Parse(BaseURL(address))
	if err != nil {
		return nil, err
	}
	r.URL.Scheme, r.URL.Host, r.Host = base.Scheme, base.Host, ""
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	resp, err := f.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusServiceUnavailable {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %s", address, bytes.TrimSpace(text))
	}
	return resp, nil
}
