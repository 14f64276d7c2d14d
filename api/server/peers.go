package server

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/blob"
	"github.com/musternet/muster/api/client"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/api/musterpb/musterpbconnect"
)

const leaderHeader = client.HeaderLeader

var errNotLeader = errors.New("this scheduler does not lead the cluster; dial the one named in the header " + leaderHeader)

// Peers is this node's side of the conversation between schedulers.
type Peers struct {
	id    api.NodeID
	key   ed25519.PrivateKey
	http  *http.Client
	blobs *http.Client
}

// NewPeers makes the client side of a node.
func NewPeers(key ed25519.PrivateKey) *Peers {
	return &Peers{
		id: api.NodeIDOf(key.Public().(ed25519.PublicKey)), key: key,
		http: &http.Client{Transport: client.NewTransport()}, blobs: &http.Client{Transport: client.NewBlobTransport()},
	}
}

// Propose asks the leader to propose what this node says for itself.
func (p *Peers) Propose(ctx context.Context, address string, r *musterpb.ProposeRequest) (*musterpb.Answer, error) {
	resp, err := musterpbconnect.NewPeersClient(p.http, client.BaseURL(address), client.Compression()).Propose(ctx, connect.NewRequest(r))
	if err != nil {
		return nil, api.FromConnect(err)
	}
	return resp.Msg.Answer, nil
}

// Join asks a cluster to take this node in.
func (p *Peers) Join(ctx context.Context, address, adminKey string, node *musterpb.Node) (cluster string, err error) {
	text, err := joinText(node)
	if err != nil {
		return "", err
	}
	request := &musterpb.JoinRequest{Node: node, Signature: ed25519.Sign(p.key, text)}
	resp, err := musterpbconnect.NewPeersClient(p.http, client.BaseURL(address), client.Bearer(adminKey)).Join(ctx, connect.NewRequest(request))
	if err != nil {
		return "", api.FromConnect(err)
	}
	return resp.Msg.Cluster, nil
}

// CheckJoin checks that the node signed the request to join.
func CheckJoin(r *musterpb.JoinRequest) error {
	text, err := joinText(r.Node)
	if err != nil {
		return err
	}
	if len(r.Node.GetPublicKey()) != ed25519.PublicKeySize || !ed25519.Verify(r.Node.PublicKey, text, r.Signature) {
		return api.Errorf(api.Denied, "scheduler %q: the request to join is not signed by its key", r.Node.GetId())
	}
	return nil
}

func joinText(node *musterpb.Node) ([]byte, error) {
	body, err := node.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("encoding a node: %w", err)
	}
	return append([]byte("muster join v1\n"), body...), nil
}

// Blobs is the blob store of one other scheduler: what it holds itself.
func (p *Peers) Blobs(address string) blob.Store {
	return blob.NewHTTP(blob.HTTPConfig{
		Client: p.blobs, Addresses: func() []string { return []string{client.BaseURL(address)} }, Replica: true,
		Authorization: func(context.Context) (string, error) { return NodeAuthorization(p.id, p.key, time.Now()), nil },
	})
}
