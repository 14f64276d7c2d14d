package verify

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// The leaves and roots of the Certificate Transparency project's reference
// tests for RFC 6962.
func TestTreeRootVectors(t *testing.T) {
	leaves := []string{"", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"}
	roots := []string{
		"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
		"fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
		"aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
		"d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
		"4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
		"76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
		"ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
		"5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
	}
	var raw [][]byte
	for n, want := range roots {
		if n > 0 {
			leaf, err := hex.DecodeString(leaves[n-1])
			if err != nil {
				t.Fatal(err)
			}
			raw = append(raw, leaf)
		}
		if got := hex.EncodeToString(treeRoot(raw)); got != want {
			t.Errorf("root of the first %d leaves = %s, want %s", n, got, want)
		}
	}
}

func manifest() *musterpb.Manifest {
	m := &musterpb.Manifest{Attempt: "att-1"}
	for i := range uint64(5) {
		sum := func(s string) []byte { return api.DigestOf([]byte{s[0], byte(i)}).Sum() }
		m.Items = append(m.Items, &musterpb.ManifestItem{Index: i, InputDigest: sum("i"), ParametersDigest: sum("p"), OutputDigest: sum("o")})
	}
	return m
}

func TestRootBindsEveryField(t *testing.T) {
	flip := func(b []byte) []byte { b = bytes.Clone(b); b[len(b)-1] ^= 1; return b }
	change := map[string]func(m *musterpb.Manifest){
		"index":      func(m *musterpb.Manifest) { m.Items[2].Index++ },
		"input":      func(m *musterpb.Manifest) { m.Items[2].InputDigest = flip(m.Items[2].InputDigest) },
		"parameters": func(m *musterpb.Manifest) { m.Items[2].ParametersDigest = flip(m.Items[2].ParametersDigest) },
		"output":     func(m *musterpb.Manifest) { m.Items[4].OutputDigest = flip(m.Items[4].OutputDigest) },
		"order":      func(m *musterpb.Manifest) { m.Items[0], m.Items[1] = m.Items[1], m.Items[0] },
		"one less":   func(m *musterpb.Manifest) { m.Items = m.Items[:4] },
		"one twice":  func(m *musterpb.Manifest) { m.Items = append(m.Items, m.Items[4]) },
		"none":       func(m *musterpb.Manifest) { m.Items = nil },
		"bytes moved from one field to the next": func(m *musterpb.Manifest) {
			it := m.Items[3]
			it.ParametersDigest = append([]byte{it.InputDigest[31]}, it.ParametersDigest...)
			it.InputDigest = it.InputDigest[:31]
		},
	}
	roots := map[string]string{string(Root(manifest())): "unchanged"}
	for name, f := range change {
		m := manifest()
		f(m)
		root := Root(m)
		if len(root) != 32 {
			t.Errorf("%s: root has %d bytes", name, len(root))
		}
		if other, ok := roots[string(root)]; ok {
			t.Errorf("%s and %s have the same root", name, other)
		}
		roots[string(root)] = name
	}
	if !bytes.Equal(Root(manifest()), Root(manifest())) {
		t.Error("the same manifest has two roots")
	}
}

func TestDigestsAreUnambiguous(t *testing.T) {
	env := func(kv ...string) (list []*musterpb.EnvVar) {
		for i := 0; i < len(kv); i += 2 {
			list = append(list, &musterpb.EnvVar{Name: kv[i], Value: kv[i+1]})
		}
		return list
	}
	distinct := map[string][]byte{
		"image and command":     ParametersDigest("a", []string{"b", "c"}, nil),
		"one argument":          ParametersDigest("a", []string{"bc"}, nil),
		"no command":            ParametersDigest("a", nil, nil),
		"empty argument":        ParametersDigest("a", []string{""}, nil),
		"environment":           ParametersDigest("a", nil, env("b", "c")),
		"environment of one":    ParametersDigest("a", nil, env("b", "")),
		"arguments moved":       ParametersDigest("a", []string{"b"}, env("c", "")),
		"two variables":         ParametersDigest("a", nil, env("b", "c", "d", "e")),
		"other image":           ParametersDigest("ab", nil, nil),
		"no input":              InputDigest(nil),
		"one input":             InputDigest([]*musterpb.Input{{Path: "x", Digest: "y"}}),
		"path and digest moved": InputDigest([]*musterpb.Input{{Path: "xy"}}),
		"two inputs":            InputDigest([]*musterpb.Input{{Path: "x", Digest: "y"}, {Path: "x", Digest: "y"}}),
	}
	seen := map[string]string{}
	for name, d := range distinct {
		if other, ok := seen[string(d)]; ok {
			t.Errorf("%s and %s have the same digest", name, other)
		}
		seen[string(d)] = name
	}
}

func signedCommit(t *testing.T) (ed25519.PublicKey, *musterpb.Commit) {
	t.Helper()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	c := &musterpb.Commit{
		Attempt: "att-1", Root: Root(manifest()), ManifestDigest: string(api.DigestOf([]byte("m"))), ArchiveDigest: string(api.DigestOf([]byte("a"))),
		LogDigest: string(api.DigestOf([]byte("l"))), ArchiveBytes: 10, OutputBytes: 20,
	}
	SignCommits(key, c)
	return key.Public().(ed25519.PublicKey), c
}

func TestCommitSignatureBindsEveryField(t *testing.T) {
	key, c := signedCommit(t)
	if err := CheckCommit(key, c); err != nil {
		t.Fatalf("a signed commit: %v", err)
	}
	other := string(api.DigestOf([]byte("other")))
	for name, f := range map[string]func(c *musterpb.Commit){
		"attempt":        func(c *musterpb.Commit) { c.Attempt = "att-2" },
		"root":           func(c *musterpb.Commit) { c.Root = api.DigestOf(nil).Sum() },
		"manifest":       func(c *musterpb.Commit) { c.ManifestDigest = other },
		"archive":        func(c *musterpb.Commit) { c.ArchiveDigest = other },
		"log":            func(c *musterpb.Commit) { c.LogDigest = other },
		"no log":         func(c *musterpb.Commit) { c.LogDigest = "" },
		"archive bytes":  func(c *musterpb.Commit) { c.ArchiveBytes++ },
		"output bytes":   func(c *musterpb.Commit) { c.OutputBytes++ },
		"sizes swapped":  func(c *musterpb.Commit) { c.ArchiveBytes, c.OutputBytes = c.OutputBytes, c.ArchiveBytes },
		"signature":      func(c *musterpb.Commit) { c.Signature[0] ^= 1 },
		"no signature":   func(c *musterpb.Commit) { c.Signature = nil },
		"leaf":           func(c *musterpb.Commit) { c.Leaf++ },
		"no leaves":      func(c *musterpb.Commit) { c.Leaves = 0 },
		"more leaves":    func(c *musterpb.Commit) { c.Leaves++ },
		"path":           func(c *musterpb.Commit) { c.Path = [][]byte{c.Root} },
		"long signature": func(c *musterpb.Commit) { c.Signature = append(c.Signature, 0) },
	} {
		_, c := signedCommit(t)
		f(c)
		if err := CheckCommit(key, c); api.KindOf(err) != api.Denied {
			t.Errorf("changed %s: %v, want a refusal of kind denied", name, err)
		}
	}
	if n := len(mustFields(c)); n != 11 {
		t.Errorf("musterpb.Commit has %d fields; this test and the signature know 11", n)
	}
	otherKey, _, _ := ed25519.GenerateKey(strings.NewReader(strings.Repeat("x", 64)))
	_, c = signedCommit(t)
	if err := CheckCommit(otherKey, c); api.KindOf(err) != api.Denied {
		t.Errorf("another worker's key: %v", err)
	}
	if err := CheckCommit(key[:31], c); api.KindOf(err) != api.Denied {
		t.Errorf("a short key: %v", err)
	}
}

func mustFields(c *musterpb.Commit) (names []string) {
	fields := c.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		names = append(names, string(fields.Get(i).Name()))
	}
	return names
}

func TestCheckCommitForm(t *testing.T) {
	for want, f := range map[string]func(c *musterpb.Commit){
		"the root has 31 bytes": func(c *musterpb.Commit) { c.Root = c.Root[:31] },
		"manifest digest":       func(c *musterpb.Commit) { c.ManifestDigest, c.ArchiveDigest, c.LogDigest = "x", "y", "z" },
		"archive digest":        func(c *musterpb.Commit) { c.ArchiveDigest, c.LogDigest = "", "z" },
		"log digest":            func(c *musterpb.Commit) { c.LogDigest = "sha256:00" },
		"negative size":         func(c *musterpb.Commit) { c.OutputBytes = -1 },
	} {
		key, c := signedCommit(t)
		f(c)
		for range 20 { // the same first fault every time
			if err := CheckCommit(key, c); api.KindOf(err) != api.Invalid || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "att-1") {
				t.Fatalf("error %v, want one of kind invalid with %q", err, want)
			}
		}
	}
	key, c := signedCommit(t)
	c.LogDigest = ""
	SignCommits(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize)), c)
	if err := CheckCommit(key, c); err != nil {
		t.Errorf("a commit without a log: %v", err)
	}
}

func TestCommitsSignedTogether(t *testing.T) {
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	public := key.Public().(ed25519.PublicKey)
	for n := 1; n <= 17; n++ {
		commits := make([]*musterpb.Commit, n)
		for i := range commits {
			_, commits[i] = signedCommit(t)
			commits[i].Attempt = fmt.Sprintf("att-%d", i)
		}
		SignCommits(key, commits...)
		for i, err := range CheckCommits(public, commits) {
			if err != nil {
				t.Errorf("%d of %d: %v", i, n, err)
			}
		}
		for i, c := range commits { // each alone, and none in another's place
			if err := CheckCommit(public, c); err != nil {
				t.Errorf("%d of %d alone: %v", i, n, err)
			}
			swapped := c.CloneVT()
			swapped.Attempt = "att-other"
			if err := CheckCommit(public, swapped); api.KindOf(err) != api.Denied {
				t.Errorf("%d of %d under another name: %v", i, n, err)
			}
		}
		// One bad apple is refused, and the others are not.
		commits[n/2].OutputBytes++
		for i, err := range CheckCommits(public, commits) {
			if (err != nil) != (i == n/2) {
				t.Errorf("%d of %d with a changed one: %v", i, n, err)
			}
		}
	}
	_, c := signedCommit(t)
	c.Path = [][]byte{make([]byte, 1<<20)}
	if err := CheckCommit(public, c); api.KindOf(err) != api.Invalid {
		t.Errorf("a hash of a megabyte in the proof: %v", err)
	}
	c.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "more"))
	if got := KnownFields(c); len(got.ProtoReflect().GetUnknown()) > 0 || !SameResult(got, c) {
		t.Errorf("the known fields of %v are %v", c, got)
	}
	_, c = signedCommit(t)
	if c.Leaves = MaxSignedTogether + 1; api.KindOf(CheckCommit(public, c)) != api.TooLarge {
		t.Error("too many commits under one signature were taken")
	}
}

// BenchmarkRoot is the Merkle root of a result of 1,000 items.
func BenchmarkRoot(b *testing.B) {
	m := &musterpb.Manifest{Attempt: "att-1"}
	for i := range uint64(1000) {
		digest := api.DigestOf([]byte{byte(i), byte(i >> 8)}).Sum()
		m.Items = append(m.Items, &musterpb.ManifestItem{Index: i, InputDigest: digest, ParametersDigest: digest, OutputDigest: digest})
	}
	b.ReportAllocs()
	for b.Loop() {
		Root(m)
	}
}

// BenchmarkCommits signs results together, and checks them: one signature for
// all, and for each its way to the root.
func BenchmarkCommits(b *testing.B) {
	for _, together := range []int{1, 20, 256} {
		key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
		var commits []*musterpb.Commit
		for i := range together {
			digest := api.DigestOf([]byte{byte(i)})
			commits = append(commits, &musterpb.Commit{
				Attempt: fmt.Sprintf("att-%d", i), Root: digest.Sum(), ManifestDigest: string(digest), ArchiveDigest: string(digest), ArchiveBytes: 1, OutputBytes: 1,
			})
		}
		b.Run(fmt.Sprintf("sign-%d", together), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				SignCommits(key, commits...)
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*together), "µs/commit")
		})
		SignCommits(key, commits...)
		b.Run(fmt.Sprintf("check-%d", together), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				for _, err := range CheckCommits(key.Public().(ed25519.PublicKey), commits) {
					if err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*together), "µs/commit")
		})
	}
}
