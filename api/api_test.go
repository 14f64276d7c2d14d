package api_test

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"connectrpc.com/connect"
	"pgregory.net/rapid"

	"github.com/musternet/muster/api"
)

func TestParseDollars(t *testing.T) {
	for text, want := range map[string]api.MicroUSD{
		"0": 0, "12": 12_000_000, "0.40": 400_000, "$0.40": 400_000, " 1.5 ": 1_500_000, "0.000001": 1, "1000000000": 1_000_000_000_000_000,
	} {
		if got, err := api.ParseDollars(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "$", ".", ".5", "-1", "1e3", "1,5", "0.0000001", "1000000001", "99999999999999999999", "abc", "1.2.3", "+1"} {
		if got, err := api.ParseDollars(text); api.KindOf(err) != api.Invalid {
			t.Errorf("%q: %d, %v; want it refused", text, got, err)
		}
	}
}

// What MicroUSD prints, ParseDollars reads.
func TestDollarsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := api.MicroUSD(rapid.Int64Range(0, int64(1_000_000_000*api.Dollars)).Draw(t, "micro"))
		if got, err := api.ParseDollars(m.String()); err != nil || got != m {
			t.Fatalf("%d prints as %s, which reads as %d, %v", m, m, got, err)
		}
	})
	if s := api.MicroUSD(-1_500_000).String(); s != "-$1.50" {
		t.Errorf("minus a dollar fifty prints as %s", s)
	}
}

func TestDigest(t *testing.T) {
	d := api.DigestOf([]byte("muster"))
	if got, err := api.ParseDigest(string(d)); err != nil || got != d || len(d.Sum()) != 32 || api.DigestFromSum(d.Sum()) != d {
		t.Errorf("%s does not survive: %s, %v", d, got, err)
	}
	for _, text := range []string{"", "sha256:", string(d) + "0", string(d[:len(d)-1]) + "G", "sha512:" + d.Hex(), "SHA256:" + d.Hex()} {
		if _, err := api.ParseDigest(text); api.KindOf(err) != api.Invalid {
			t.Errorf("%q: %v, want it refused", text, err)
		}
		if api.Digest("sha256:xyz").Sum() != nil {
			t.Error("a malformed digest has a sum")
		}
	}
}

func TestIDsFollowFromKeys(t *testing.T) {
	a := ed25519.NewKeyFromSeed(make([]byte, 32)).Public().(ed25519.PublicKey)
	b := ed25519.NewKeyFromSeed([]byte("another seed of thirty-two bytes")).Public().(ed25519.PublicKey)
	if api.WorkerIDOf(a) == api.WorkerIDOf(b) || api.NodeIDOf(a) == api.NodeIDOf(b) {
		t.Error("IDs do not tell keys apart")
	}
	if len(api.WorkerIDOf(a)) != len("wrk-0123456789abcdef") {
		t.Errorf("worker ID %s", api.WorkerIDOf(a))
	}
}

// A kind survives the way over RPC and over plain HTTP.
func TestKinds(t *testing.T) {
	for k := api.Internal; k <= api.Unavailable; k++ {
		err := fmt.Errorf("while testing: %w", api.Errorf(k, "value %q is wrong", "x"))
		if api.KindOf(err) != k {
			t.Errorf("%s: wrapped it is %s", k, api.KindOf(err))
		}
		over := api.FromConnect(api.ToConnect(err))
		if api.KindOf(over) != k || over.Error() != err.Error() {
			t.Errorf("%s over RPC: %s, %q", k, api.KindOf(over), over)
		}
		if api.KindOfHTTP(k.HTTP()) != k {
			t.Errorf("%s over HTTP: %s", k, api.KindOfHTTP(k.HTTP()))
		}
	}
	if api.KindOfHTTP(http.StatusTeapot) != api.Internal || api.KindOf(errors.New("x")) != api.Internal {
		t.Error("what has no kind is not internal")
	}
	if api.ToConnect(nil) != nil || api.FromConnect(nil) != nil {
		t.Error("no error became one")
	}
	if api.KindOf(connect.NewError(connect.CodeDeadlineExceeded, errors.New("late"))) != api.Unavailable {
		t.Error("a deadline is not told as unavailable")
	}
	cause := errors.New("disk full")
	if err := api.Errorf(api.Unavailable, "storing: %w", cause); !errors.Is(err, cause) {
		t.Error("the cause is lost")
	}
}
