package verify

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"math/bits"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
)

// Root is the Merkle root of a manifest, with the hashing of RFC 6962: one
// leaf per item, in the order of the manifest. An item's leaf binds its index,
// what it was computed from, how, and what came out. Where the item lies in the
// archive is no part of it: Commit.ManifestDigest binds that.
func Root(m *musterpb.Manifest) []byte {
	leaves := make([][]byte, len(m.Items))
	for i, item := range m.Items {
		leaves[i] = Leaf(item)
	}
	return treeRoot(leaves)
}

func treeRoot(leaves [][]byte) []byte {
	tree := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)
	for _, leaf := range leaves {
		// Append fails only for a range that does not start at 0.
		_ = tree.Append(rfc6962.DefaultHasher.HashLeaf(leaf), nil)
	}
	root, err := tree.GetRootHash(nil)
	if err != nil || root == nil {
		return rfc6962.DefaultHasher.EmptyRoot()
	}
	return root
}

// Leaf is the content of an item's leaf: index ‖ input digest ‖ parameters
// digest ‖ output digest, each preceded by its length.
func Leaf(item *musterpb.ManifestItem) []byte {
	leaf := binary.BigEndian.AppendUint64(nil, item.Index)
	for _, part := range [][]byte{item.InputDigest, item.ParametersDigest, item.OutputDigest} {
		leaf = appendBytes(leaf, part)
	}
	return leaf
}

// InputDigest binds everything that an attempt reads: its inputs by path and
// digest. Two attempts with the same inputs have the same digest.
func InputDigest(inputs []*musterpb.Input) []byte {
	h := sha256.New()
	h.Write([]byte("muster inputs v1\n"))
	for _, in := range inputs {
		writeBytes(h, []byte(in.Path))
		writeBytes(h, []byte(in.Digest))
	}
	return h.Sum(nil)
}

// ParametersDigest binds what is run: the image, the command as the customer
// wrote it, and the environment.
func ParametersDigest(image string, command []string, env []*musterpb.EnvVar) []byte {
	h := sha256.New()
	h.Write([]byte("muster parameters v1\n"))
	writeBytes(h, []byte(image))
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(command))))
	for _, arg := range command {
		writeBytes(h, []byte(arg))
	}
	for _, e := range env {
		writeBytes(h, []byte(e.Name))
		writeBytes(h, []byte(e.Value))
	}
	return h.Sum(nil)
}

// commitMessage is the leaf of a commit; the first line keeps a signature over
// it from meaning anything elsewhere.
func commitMessage(c *musterpb.Commit) []byte {
	msg := []byte("muster commit v1\n")
	for _, part := range [][]byte{[]byte(c.Attempt), c.Root, []byte(c.ManifestDigest), []byte(c.ArchiveDigest), []byte(c.LogDigest)} {
		msg = appendBytes(msg, part)
	}
	msg = binary.BigEndian.AppendUint64(msg, uint64(c.ArchiveBytes))
	return binary.BigEndian.AppendUint64(msg, uint64(c.OutputBytes))
}

// MaxSignedTogether bounds how many commits one signature may cover.
const MaxSignedTogether = 4096

// SignCommits signs commits with the worker's key: one signature over the root
// of the Merkle tree (RFC 6962) whose leaves they are, and in each the proof that
// it is in there. A commit can be checked without the others. None may be listed
// twice.
func SignCommits(key ed25519.PrivateKey, commits ...*musterpb.Commit) {
	if len(commits) == 0 {
		return
	}
	hashes := make([][]byte, len(commits))
	for i, c := range commits {
		hashes[i] = rfc6962.DefaultHasher.HashLeaf(commitMessage(c))
		c.Leaf, c.Leaves, c.Path = uint64(i), uint64(len(commits)), nil
	}
	root := provePaths(hashes, commits)
	signature := ed25519.Sign(key, treeMessage(root, len(commits)))
	for _, c := range commits {
		c.Signature = signature
	}
}

// provePaths appends to each commit its audit path in the tree of hashes, and
// returns the root (RFC 6962, 2.1 and 2.1.1).
func provePaths(hashes [][]byte, commits []*musterpb.Commit) []byte {
	if len(hashes) == 1 {
		return hashes[0]
	}
	k := 1 << (bits.Len(uint(len(hashes)-1)) - 1) // the largest power of two below
	left, right := provePaths(hashes[:k], commits[:k]), provePaths(hashes[k:], commits[k:])
	for i, c := range commits {
		if i < k {
			c.Path = append(c.Path, right)
		} else {
			c.Path = append(c.Path, left)
		}
	}
	return rfc6962.DefaultHasher.HashChildren(left, right)
}

// treeMessage is what the key signs for a tree of commits.
func treeMessage(root []byte, leaves int) []byte {
	msg := appendBytes([]byte("muster commits v1\n"), root)
	return binary.BigEndian.AppendUint64(msg, uint64(leaves))
}

// CheckCommit checks the form of c and its signature by the worker.
func CheckCommit(key ed25519.PublicKey, c *musterpb.Commit) error {
	return CheckCommits(key, []*musterpb.Commit{c})[0]
}

// CheckCommits checks commits one by one, and a signature that several share
// only once. There is one result for each of them.
func CheckCommits(key ed25519.PublicKey, commits []*musterpb.Commit) []error {
	results := make([]error, len(commits))
	signed := map[string]bool{} // by root, number of leaves and signature
	for i, c := range commits {
		if results[i] = checkForm(c); results[i] != nil {
			continue
		}
		root, err := proof.RootFromInclusionProof(rfc6962.DefaultHasher, c.Leaf, c.Leaves, rfc6962.DefaultHasher.HashLeaf(commitMessage(c)), c.Path)
		if err != nil {
			results[i] = api.Errorf(api.Denied, "result of %s: the proof that its signature covers it is malformed: %w", c.Attempt, err)
			continue
		}
		message := treeMessage(root, int(c.Leaves))
		id := string(message) + string(c.Signature)
		good, seen := signed[id]
		if !seen {
			good = len(key) == ed25519.PublicKeySize && ed25519.Verify(key, message, c.Signature)
			signed[id] = good
		}
		if !good {
			results[i] = api.Errorf(api.Denied, "result of %s: the signature is not by the worker that ran it", c.Attempt)
		}
	}
	return results
}

func checkForm(c *musterpb.Commit) error {
	if len(c.Root) != sha256.Size {
		return api.Errorf(api.Invalid, "result of %s: the root has %d bytes, want %d", c.Attempt, len(c.Root), sha256.Size)
	}
	// A list and not a map: every scheduler has to give the same answer.
	for _, d := range []struct{ name, digest string }{
		{"manifest", c.ManifestDigest}, {"archive", c.ArchiveDigest}, {"log", c.LogDigest},
	} {
		if d.name == "log" && d.digest == "" {
			continue // an attempt need not have a log
		}
		if _, err := api.ParseDigest(d.digest); err != nil {
			return api.Errorf(api.Invalid, "result of %s: %s %w", c.Attempt, d.name, err)
		}
	}
	if c.ArchiveBytes < 0 || c.OutputBytes < 0 {
		return api.Errorf(api.Invalid, "result of %s: negative size (archive %d bytes, outputs %d bytes)", c.Attempt, c.ArchiveBytes, c.OutputBytes)
	}
	if len(c.Signature) != ed25519.SignatureSize {
		return api.Errorf(api.Denied, "result of %s: the signature is not by the worker that ran it: it has %d bytes, want %d", c.Attempt, len(c.Signature), ed25519.SignatureSize)
	}
	// Every scheduler keeps the proof: nothing in it may be larger than it has to be.
	for _, hash := range c.Path {
		if len(hash) != sha256.Size {
			return api.Errorf(api.Invalid, "result of %s: its inclusion proof has a hash of %d bytes, want %d", c.Attempt, len(hash), sha256.Size)
		}
	}
	if c.Leaves > MaxSignedTogether {
		return api.Errorf(api.TooLarge, "result of %s: signed together with %d others, at most %d are allowed", c.Attempt, c.Leaves, MaxSignedTogether)
	}
	return nil
}

// KnownFields is a commit without what a sender may have added that this version
// does not know.
func KnownFields(c *musterpb.Commit) *musterpb.Commit {
	return &musterpb.Commit{
		Attempt: c.Attempt, Root: c.Root, ManifestDigest: c.ManifestDigest, ArchiveDigest: c.ArchiveDigest, ArchiveBytes: c.ArchiveBytes,
		OutputBytes: c.OutputBytes, Signature: c.Signature, LogDigest: c.LogDigest, Leaf: c.Leaf, Leaves: c.Leaves, Path: c.Path,
	}
}

// SameResult reports whether two commits bind their worker to the same outputs,
// with whatever others they were signed.
func SameResult(a, b *musterpb.Commit) bool {
	return a != nil && b != nil && bytes.Equal(commitMessage(a), commitMessage(b))
}

func appendBytes(b, part []byte) []byte {
	return append(binary.BigEndian.AppendUint64(b, uint64(len(part))), part...)
}

func writeBytes(h hash.Hash, part []byte) {
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
	h.Write(part)
}
