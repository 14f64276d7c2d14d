// Package api is the vocabulary that every part of muster shares: typed IDs,
// the kinds of errors, and units. The wire messages are in api/musterpb.
package api

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// The IDs. Each is opaque text; the prefix tells a reader what it names.
type (
	AccountID string // "acme"
	JobID     string // "job-<base32>"
	TaskID    string // "<job>/<number>"
	AttemptID string // "att-<hex>": the fencing token of a run
	WorkerID  string // "wrk-<hex>": from the public key
	NodeID    string // "sch-<hex>": a scheduler, from its public key
)

// Digest is "sha256:<64 hex digits>".
type Digest string

// DigestOf is the digest of bytes.
func DigestOf(b []byte) Digest {
	sum := sha256.Sum256(b)
	return DigestFromSum(sum[:])
}

// DigestFromSum is the digest with this SHA-256 sum.
func DigestFromSum(sum []byte) Digest { return Digest("sha256:" + hex.EncodeToString(sum)) }

// ParseDigest checks the form of a digest.
func ParseDigest(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != 64 || strings.Trim(h, "0123456789abcdef") != "" {
		return "", Errorf(Invalid, "digest %q: want sha256: and 64 lower-case hex digits", s)
	}
	return Digest(s), nil
}

// Hex is the digest without its algorithm.
func (d Digest) Hex() string { return strings.TrimPrefix(string(d), "sha256:") }

// Sum is the raw SHA-256 sum; nil for a malformed digest.
func (d Digest) Sum() []byte {
	sum, err := hex.DecodeString(d.Hex())
	if err != nil || len(sum) != sha256.Size {
		return nil
	}
	return sum
}

// WorkerIDOf is the identity of the worker with this public key.
func WorkerIDOf(key ed25519.PublicKey) WorkerID {
	sum := sha256.Sum256(key)
	return WorkerID("wrk-" + hex.EncodeToString(sum[:8]))
}

// NodeIDOf is the identity of the scheduler with this public key.
func NodeIDOf(key ed25519.PublicKey) NodeID {
	sum := sha256.Sum256(key)
	return NodeID("sch-" + hex.EncodeToString(sum[:8]))
}

// MicroUSD is an amount of money in millionths of a dollar.
type MicroUSD int64

// Dollars is one dollar.
const Dollars MicroUSD = 1_000_000

// String is the amount in dollars with as many decimals as it needs, at least
// two: "$0.40", "$0.000123", "-$1.50".
func (m MicroUSD) String() string {
	sign, u := "", uint64(m)
	if m < 0 {
		sign, u = "-", -u
	}
	frac := fmt.Sprintf("%06d", u%1_000_000)
	for len(frac) > 2 && frac[len(frac)-1] == '0' {
		frac = frac[:len(frac)-1]
	}
	return fmt.Sprintf("%s$%d.%s", sign, u/1_000_000, frac)
}

// ParseDollars reads "12", "0.40" or "$0.40" without going through a float.
func ParseDollars(s string) (MicroUSD, error) {
	whole, frac, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(s), "$"), ".")
	if len(frac) > 6 {
		return 0, Errorf(Invalid, "amount %q: at most 6 decimals (a millionth of a dollar)", s)
	}
	digits := whole + frac
	if digits == "" || whole == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, Errorf(Invalid, "amount %q: want dollars such as 12 or 0.40", s)
	}
	n, err := strconv.ParseInt(digits+strings.Repeat("0", 6-len(frac)), 10, 64)
	if err != nil || n > 1_000_000_000*int64(Dollars) {
		return 0, Errorf(Invalid, "amount %q: more than a billion dollars", s)
	}
	return MicroUSD(n), nil
}

// ChallengeText is what a worker signs to prove to a scheduler that it holds
// its key; the first line keeps the signature from meaning anything elsewhere.
func ChallengeText(nonce []byte) []byte { return append([]byte("muster session v1\n"), nonce...) }
