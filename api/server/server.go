// Package server is a scheduler's API: RPC for customers, owners and
// operators, workers' sessions, what schedulers say to each other, and blobs,
// all on one port. Any scheduler takes any call: one that does not lead passes
// it on.
package server

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/semaphore"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
	"github.com/musternet/muster/scheduler/archive"
	"github.com/musternet/muster/scheduler/state"
)

// Scheduler is the scheduler behind the API.
type Scheduler interface {
	ID() api.NodeID
	// Propose replicates a command; the error is the refusal, or of kind
	// api.Unavailable when it is not known what became of the command.
	Propose(ctx context.Context, cmd *musterpb.Command) (id string, err error)
	// CheckRead makes the reads that follow linearizable, or fails on a node that
	// can't answer for the cluster.
	CheckRead() error
	// Leader is the node that leads, with its API address; empty during elections.
	Leader() (api.NodeID, string)
	// AwaitLeader is Leader, once an election that is under way is over.
	AwaitLeader(ctx context.Context) (api.NodeID, string)
	Explain(job string) (*musterpb.ExplainJobResponse, error)
	// Connected reports which workers have a session, LogTail what a running
	// attempt printed last. Only the leader knows either.
	Connected() map[string]bool
	LogTail(attempt string) []byte
}

// Cluster is the part of a scheduler that its peers and workers talk to.
type Cluster interface {
	Join(ctx context.Context, node *musterpb.Node) error
	ProposeForNode(ctx context.Context, r *musterpb.ProposeRequest) (*musterpb.Answer, error)
	// Session runs a worker's session; owner is the account of its key.
	Session(ctx context.Context, owner string, stream *connect.BidiStream[musterpb.WorkerMessage, musterpb.SchedulerMessage]) error
	Term() uint64
	Applied() uint64
}

// Limits of what the API takes.
const (
	MaxRequestBytes = 8 << 20
	// maxReportBytes bounds a message of a worker; workers send at most half as much.
	maxReportBytes = 4 << 20
	MaxBlobBytes   = 64 << 30
)

// Config is what a server is made of.
type Config struct {
	State     *state.State
	Scheduler Scheduler
	Cluster   Cluster
	History   History // nil: nothing is ever sealed
	// Blobs answers customers and workers; Local is this node's own copy, for
	// its peers. They are the same in a store that is shared.
	Blobs, Local blob.Store
	Logger       *slog.Logger
}

// Server is the API of one scheduler.
type Server struct {
	Config
	forwarding *semaphore.Weighted // bytes of requests that are being read to be passed on
}

// New makes a server; Serve runs it.
func New(cfg Config) *Server {
	if cfg.History == nil {
		cfg.History = noHistory{}
	}
	return &Server{Config: cfg, forwarding: semaphore.NewWeighted(maxForwardedBytes)}
}

// Handler routes every call.
func (s *Server) Handler() http.Handler {
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(MaxRequestBytes), connect.WithInterceptors(errorKinds{s.Logger}),
		connect.WithRecover(s.recovered), client.Compression(),
	}
	mux := http.NewServeMux()
	path, muster := musterpbconnect.NewMusterHandler(s, options...)
	mux.Handle(path, s.forwarded(s.authenticated(muster))) // the leader knows every key
	path, sessions := musterpbconnect.NewSessionsHandler((*sessionService)(s), append(options, client.SessionWire(), connect.WithReadMaxBytes(maxReportBytes))...)
	mux.Handle(path, s.authenticated(writesWithin(sessionWrite, sessions)))
	path, peers := musterpbconnect.NewPeersHandler((*peerService)(s), options...)
	mux.Handle(path, s.forwarded(peers))
	blobs := blob.Handler(s.Blobs, s.mayUseBlobs, MaxBlobBytes)
	local := blob.Handler(s.Local, s.mayUseBlobs, MaxBlobBytes)
	mux.Handle("/blob/", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(blob.ReplicaHeader) != "" {
			local.ServeHTTP(w, r)
			return
		}
		blobs.ServeHTTP(w, r)
	}))
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	return mux
}

func (s *Server) recovered(_ context.Context, spec connect.Spec, _ http.Header, p any) error {
	s.Logger.Error("a call panicked", "procedure", spec.Procedure, "panic", p)
	return api.Errorf(api.Internal, "the scheduler failed at this call; its log says more")
}

// Serve answers on l until ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	srv := &http.Server{
		Handler: s.Handler(), Protocols: protocols,
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		HTTP2:       &http.HTTP2Config{MaxConcurrentStreams: 10_000, SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second},
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(s.Logger.Handler(), slog.LevelDebug),
	}
	down := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(down)
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close() // whoever still reads is cut off
		}
	})
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-down // what the calls use is closed next
	return nil
}

// errorKinds gives errors the status of their kind, and keeps from customers
// what is for operators.
type errorKinds struct{ logger *slog.Logger }

func (e errorKinds) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		return resp, e.shown(ctx, req.Spec(), err)
	}
}

func (errorKinds) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (e errorKinds) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		return e.shown(ctx, conn.Spec(), next(ctx, conn))
	}
}

// shown is what the caller sees of an error. The name of a sealed segment is in
// the log, and shown to admins alone: a segment holds the work of all accounts.
func (e errorKinds) shown(ctx context.Context, spec connect.Spec, err error) error {
	var unreadable *archive.Unreadable
	if !errors.As(err, &unreadable) {
		return api.ToConnect(err)
	}
	if ctx.Err() == nil { // else the caller went away, which is no fault of the segment
		e.logger.Error("sealed work could not be read", "segment", unreadable.Digest, "procedure", spec.Procedure, "err", err)
	}
	if !isAdmin(ctx) {
		err = api.Errorf(api.KindOf(err), "sealed work can't be read now; try again later, or ask who operates the schedulers: their log says more")
	}
	return api.ToConnect(err)
}

const (
	headerForwarded = "Muster-Forwarded"
	// HeaderRead asks for "stale" reads, which any scheduler answers by itself.
	HeaderRead = "Muster-Read"
)

// electionWait is how long a call waits for an election to end: most end sooner,
// and whoever calls would only call again.
const electionWait = 2 * time.Second

func (s *Server) awaitLeader(ctx context.Context) (api.NodeID, string) {
	ctx, cancel := context.WithTimeout(ctx, electionWait)
	defer cancel()
	return s.Scheduler.AwaitLeader(ctx)
}

// forwarded passes a call on to the leader where this node is not it.
func (s *Server) forwarded(next http.Handler) http.Handler {
	transport := client.NewTransport()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(HeaderRead) == "stale" {
			next.ServeHTTP(w, r)
			return
		}
		leader, address := s.awaitLeader(r.Context())
		switch {
		case leader == s.Scheduler.ID():
			next.ServeHTTP(w, r)
		case address == "" || r.Header.Get(headerForwarded) != "":
			writeError(w, r, api.Errorf(api.Unavailable, "the schedulers are electing a leader; try again in a second"))
		default:
			// The whole request is read first. Where the leader answers before it has
			// read all of it, net/http's HTTP/2 may never end the answer (Go 1.26).
			body, err := s.readRequest(w, r)
			if err != nil {
				writeError(w, r, err)
				return
			}
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			target, err := url.Parse(client.BaseURL(address))
			if err != nil {
				writeError(w, r, api.Errorf(api.Internal, "leader %s has the address %q: %w", leader, address, err))
				return
			}
			proxy := &httputil.ReverseProxy{
				Rewrite: func(p *httputil.ProxyRequest) {
					p.SetURL(target)
					p.Out.Header.Set(headerForwarded, string(s.Scheduler.ID()))
				},
				Transport: transport, FlushInterval: -1,
				ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
					writeError(w, r, api.Errorf(api.Unavailable, "the leader at %s does not answer: %w", address, err))
				},
				ErrorLog: slog.NewLogLogger(s.Logger.Handler(), slog.LevelDebug),
			}
			proxy.ServeHTTP(w, r)
		}
	})
}

// Bounds of what is read to be passed on: how long a caller may take, and how
// much memory all of them together.
const (
	forwardWithin     = 30 * time.Second
	maxForwardedBytes = 256 << 20
)

// readRequest reads a request as a whole.
func (s *Server) readRequest(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	size := int64(MaxRequestBytes)
	if r.ContentLength >= 0 && r.ContentLength < size {
		size = r.ContentLength
	}
	if !s.forwarding.TryAcquire(size) {
		return nil, api.Errorf(api.Unavailable, "this scheduler passes on too many large requests at once; try again, or ask the leader")
	}
	defer s.forwarding.Release(size)
	control := http.NewResponseController(w)
	// Both fail only where the connection has no deadlines, as in tests.
	_ = control.SetReadDeadline(time.Now().Add(forwardWithin))
	defer func() { _ = control.SetReadDeadline(time.Time{}) }()
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxRequestBytes))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, api.Errorf(api.TooLarge, "reading the request: %w; at most %d bytes are taken", err, MaxRequestBytes)
	case err != nil:
		return nil, api.Errorf(api.Unavailable, "reading the request: %w", err)
	}
	return body, nil
}

// writeError answers an RPC outside of its handler.
func writeError(w http.ResponseWriter, r *http.Request, err error) {
	_ = connect.NewErrorWriter().Write(w, r, api.ToConnect(err))
}

// nodeSignatureWindow is how far the clocks of two schedulers may differ.
const nodeSignatureWindow = 5 * time.Minute

// NodeAuthorization is the Authorization header with which a scheduler asks
// another for a copy of a blob.
func NodeAuthorization(id api.NodeID, key ed25519.PrivateKey, now time.Time) string {
	stamp := strconv.FormatInt(now.Unix(), 10)
	return "Muster-Node " + string(id) + " " + stamp + " " + encode(ed25519.Sign(key, nodeText(string(id), stamp)))
}

func nodeText(id, stamp string) []byte { return []byte("muster node v1\n" + id + "\n" + stamp) }

// mayUseBlobs lets in holders of any API key, and the cluster's schedulers.
// Sealed segments hold the work of all accounts: to all but schedulers and admins
// they look as if they did not exist.
func (s *Server) mayUseBlobs(r *http.Request) (blob.Caller, error) {
	if rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Muster-Node "); ok {
		return blob.Caller{ID: rest[:strings.IndexByte(rest+" ", ' ')], Peer: true}, s.checkNode(rest)
	}
	key, err := s.authenticate(r.Header.Get("Authorization"))
	if err != nil {
		return blob.Caller{}, err
	}
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch {
	case r.Header.Get(blob.ReplicaHeader) != "":
		return blob.Caller{}, api.Errorf(api.Denied, "only schedulers may ask for the copy of one node")
	case !reads && key.Role == musterpb.Role_ROLE_READER:
		return blob.Caller{}, api.Errorf(api.Denied, "a reader key may not upload")
	case key.Role != musterpb.Role_ROLE_ADMIN && s.isSegment(r.URL.Path):
		return blob.Caller{}, api.Errorf(api.NotFound, "blob %s is not here", strings.TrimPrefix(r.URL.Path, blob.Path("")))
	}
	return blob.Caller{ID: string(key.Hash)}, nil
}

// isSegment reports whether a path is that of a segment that the state names.
func (s *Server) isSegment(path string) bool {
	return slices.ContainsFunc(s.State.Segments(), func(segment *musterpb.Segment) bool {
		return path == blob.Path(api.Digest(segment.Digest))
	})
}

func (s *Server) checkNode(header string) error {
	fields := strings.Fields(header)
	if len(fields) != 3 {
		return api.Errorf(api.Unauthenticated, "malformed scheduler authorization")
	}
	node := s.State.Node(fields[0])
	unix, err := strconv.ParseInt(fields[1], 10, 64)
	signature := decode(fields[2])
	if node == nil || err != nil || !ed25519.Verify(node.PublicKey, nodeText(fields[0], fields[1]), signature) {
		return api.Errorf(api.Unauthenticated, "scheduler %q is not part of this cluster, or its signature is wrong", fields[0])
	}
	if d := time.Since(time.Unix(unix, 0)).Abs(); d > nodeSignatureWindow {
		return api.Errorf(api.Unauthenticated, "the clocks of scheduler %s and this one differ by %s; at most %s is allowed", fields[0], d.Round(time.Second), nodeSignatureWindow)
	}
	return nil
}
