package scheduler

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/state"
	"github.com/musternet/muster/verify"
)

// chains keeps this node's hash chains and the secrets that they come from: the
// one that it reveals from, and the next one while that waits to be registered.
// The old one goes only once the new one is in use: this node may lag behind,
// and think that it left the committee when it is in it again.
type chains struct {
	path          string // of the secret in use; the next one's has nextSuffix
	current, next *verify.Chain
}

const nextSuffix = ".next"

// openChains loads what an earlier process kept.
func openChains(path string) (c *chains, err error) {
	c = &chains{path: path}
	if c.current, err = openChain(path); err != nil {
		return nil, err
	}
	if c.next, err = openChain(path + nextSuffix); err != nil {
		return nil, err
	}
	return c, nil
}

// openChain is the chain of the secret in a file, nil where there is none.
func openChain(path string) (*verify.Chain, error) {
	secret, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("reading the secret of the hash chain: %w", err)
	case len(secret) != 32:
		return nil, fmt.Errorf("the secret of the hash chain in %s has %d bytes, want 32; remove the file to start a new chain", path, len(secret))
	}
	return verify.NewChain(secret), nil
}

// tip is that of the chain to register next. Its secret is on disk before
// anybody hears of the tip, and as long as nothing of it was revealed it may be
// registered again.
func (c *chains) tip() ([]byte, error) {
	if c.next == nil {
		secret := make([]byte, 32)
		if _, err := rand.Read(secret); err != nil {
			return nil, fmt.Errorf("making a secret for the hash chain: %w", err)
		}
		if err := writeFileSync(c.path+nextSuffix, secret); err != nil {
			return nil, fmt.Errorf("keeping the secret of the hash chain: %w", err)
		}
		c.next = verify.NewChain(secret)
	}
	return c.next.Tip(), nil
}

// reveal is the next value of the chain that the node is registered with, nil
// where this is none of its own or has run out.
func (c *chains) reveal(node *musterpb.Node) ([]byte, error) {
	if c.next != nil {
		if value := c.next.Reveal(node.Reveals, node.Tip); value != nil {
			if err := os.Rename(c.path+nextSuffix, c.path); err != nil {
				return nil, fmt.Errorf("keeping the secret of the hash chain: %w", err)
			}
			c.current, c.next = c.next, nil
			return value, nil
		}
	}
	if c.current == nil {
		return nil, nil
	}
	return c.current.Reveal(node.Reveals, node.Tip), nil
}

// takePartInDraws keeps this node in the committee: it registers a chain, and
// reveals its next value when, and only when, a closed batch is committed.
func (s *Scheduler) takePartInDraws(ctx context.Context, c *chains) error {
	for ctx.Err() == nil {
		changed := s.State.Changed()
		err := s.takePart(ctx, c)
		if err != nil {
			s.Logger.Debug("could not take part in the draw; trying again", "err", err)
		}
		retry := time.NewTimer(time.Minute)
		if err != nil {
			retry.Reset(100 * time.Millisecond)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-retry.C:
		}
		retry.Stop()
	}
	return nil
}

func (s *Scheduler) takePart(ctx context.Context, c *chains) error {
	node := s.State.Node(string(s.id))
	if node == nil {
		return nil // not registered yet
	}
	value, err := c.reveal(node)
	if err != nil {
		return err
	}
	batch := s.State.Drawing()
	if value == nil {
		if batch != nil {
			return nil // a new chain may not enter while a batch is drawn
		}
		tip, err := c.tip()
		if err != nil {
			return err
		}
		return s.proposeAsNode(ctx, &musterpb.Command{Body: &musterpb.Command_RegisterTip{RegisterTip: &musterpb.RegisterTip{Node: node.Id, Tip: tip}}})
	}
	if batch == nil || !slices.Contains(batch.Committee, node.Id) ||
		slices.ContainsFunc(batch.Reveals, func(r *musterpb.Reveal) bool { return r.Node == node.Id }) {
		return nil
	}
	reveal := &musterpb.Reveal{Node: node.Id, Epoch: batch.Epoch, Value: value}
	return s.proposeAsNode(ctx, &musterpb.Command{Body: &musterpb.Command_Reveal{Reveal: &musterpb.RevealValue{Reveal: reveal}}})
}

// proposeAsNode brings what this node says for itself to the leader.
func (s *Scheduler) proposeAsNode(ctx context.Context, cmd *musterpb.Command) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if s.Replica.Leading() {
		_, err := s.Propose(ctx, cmd)
		return err
	}
	_, address := s.Leader()
	if address == "" {
		return api.Errorf(api.Unavailable, "no leader is known")
	}
	request := &musterpb.ProposeRequest{Node: string(s.id), Command: cmd}
	text, err := ProposalText(request, s.State.Node(string(s.id)))
	if err != nil {
		return err
	}
	request.Signature = ed25519.Sign(s.Key, text)
	answer, err := s.Peers.Propose(ctx, address, request)
	if err != nil {
		return err
	}
	return state.ErrorOf(answer)
}

// ProposalText is what a node signs when it asks the leader to propose. It names
// where the node's hash chain is: replayed later, an old proposal could turn the
// chain back to values that everybody knows.
func ProposalText(r *musterpb.ProposeRequest, node *musterpb.Node) ([]byte, error) {
	body, err := r.Command.MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("encoding a proposal: %w", err)
	}
	return fmt.Appendf(nil, "muster proposal v1\n%s\n%x %d\n%s", r.Node, node.GetTip(), node.GetReveals(), body), nil
}

// ProposeForNode proposes what another scheduler says for itself: its tip or a
// reveal, signed with its key, and nothing else.
func (s *Scheduler) ProposeForNode(ctx context.Context, r *musterpb.ProposeRequest) (*musterpb.Answer, error) {
	node := s.State.Node(r.Node)
	if node == nil {
		return nil, api.Errorf(api.Denied, "scheduler %q is not part of this cluster", r.Node)
	}
	text, err := ProposalText(r, node)
	if err != nil {
		return nil, err
	}
	if !ed25519.Verify(node.PublicKey, text, r.Signature) {
		return nil, api.Errorf(api.Denied, "the proposal is not signed by scheduler %s", r.Node)
	}
	var subject string
	switch body := r.Command.GetBody().(type) {
	case *musterpb.Command_RegisterTip:
		subject = body.RegisterTip.GetNode()
	case *musterpb.Command_Reveal:
		subject = body.Reveal.GetReveal().GetNode()
	}
	if subject != r.Node {
		return nil, api.Errorf(api.Denied, "scheduler %s may propose its own tip and reveals only", r.Node)
	}
	return s.Replica.Propose(ctx, &musterpb.Command{Body: r.Command.Body}) // its ID is for clients to choose
}

// writeFileSync replaces a file so that either the old or the new content
// survives a crash.
func writeFileSync(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already after the rename
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
