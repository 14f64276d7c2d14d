package scheduler

import (
	"context"
	"sync"
	"time"
)

// Bounds of what waits to be stored, and of one bundle.
const (
	maxBundle  = 1 << 20
	maxPending = 64 << 20 // of one account's results
	// storeWithin bounds how long one bundle may take.
	storeWithin = time.Minute
)

// bundles gathers small results while the store is busy with the ones before,
// as group commit does with commands: a lone result does not wait, and many
// share a blob. A bundle holds results of one account's jobs only, since whoever
// may read one of them can read the blob.
type bundles struct {
	l *leader

	mu      sync.Mutex
	pending map[string]*pending // guarded by mu; by account
}

// pending are one account's results that wait while a bundle of it is stored.
type pending struct {
	offers []*offer
	bytes  int
}

// add stores and enters results whose attempts were reserved, and releases them.
func (b *bundles) add(offers []*offer) {
	byAccount := map[string][]*offer{}
	for _, o := range offers {
		job := b.l.jobOf(o.commit.Attempt)
		if job == nil {
			b.l.release([]*offer{o}) // sealed meanwhile
			continue
		}
		byAccount[job.Account] = append(byAccount[job.Account], o)
	}
	for account, offers := range byAccount {
		if !b.queue(account, offers) {
			b.l.Logger.Warn("too many results wait to be stored; their workers offer them again", "account", account, "results", len(offers))
			b.l.release(offers)
		}
	}
}

// queue appends to what waits, and starts storing unless that is under way.
func (b *bundles) queue(account string, offers []*offer) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.pending[account]
	if p == nil {
		p = &pending{}
		if !b.l.goBeside(func() { b.drain(account, p) }) {
			return false
		}
		b.pending[account] = p
	}
	if p.bytes > maxPending {
		return false
	}
	for _, o := range offers {
		p.offers = append(p.offers, o)
		p.bytes += o.size()
	}
	return true
}

func (o *offer) size() int { return len(o.manifest) + len(o.archive) + len(o.log) }

// drain stores what waits, bundle by bundle, until nothing does.
func (b *bundles) drain(account string, p *pending) {
	for {
		offers := b.next(account, p)
		if len(offers) == 0 {
			return
		}
		ctx, cancel := context.WithTimeout(b.l.ctx, storeWithin)
		stored, err := b.l.store(ctx, offers)
		cancel()
		if err != nil {
			b.l.Logger.Warn("results could not be stored; their workers offer them again", "account", account, "results", len(offers), "err", err)
			b.l.release(offers)
			continue
		}
		// The next bundle gathers until this one is in the log, too: on a busy
		// machine few large ones cost less than many small ones.
		b.l.propose(offers, stored)
		b.l.release(offers)
	}
}

// next takes a bundle's worth of what waits; none ends the draining.
func (b *bundles) next(account string, p *pending) []*offer {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(p.offers) == 0 {
		delete(b.pending, account)
		return nil
	}
	n, size := 0, 0
	for n < len(p.offers) && size < maxBundle {
		size += p.offers[n].size()
		n++
	}
	offers := p.offers[:n:n]
	p.offers = p.offers[n:]
	p.bytes -= size
	return offers
}
