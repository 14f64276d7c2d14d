package verify

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"hash"

	"github.com/transparency-dev/merkle/compact"
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

// commitMessage is what a worker signs; the first line keeps the signature
// from meaning anything elsewhere.
func commitMessage(c *musterpb.Commit) []byte {
	msg := []byte("muster commit v1\n")
	for _, part := range [][]byte{[]byte(c.Attempt), c.Root, []byte(c.ManifestDigest), []byte(c.ArchiveDigest), []byte(c.LogDigest)} {
		msg = appendBytes(msg, part)
	}
	msg = binary.BigEndian.AppendUint64(msg, uint64(c.ArchiveBytes))
	return binary.BigEndian.AppendUint64(msg, uint64(c.OutputBytes))
}

// SignCommit signs c with the worker's key.
func SignCommit(key ed25519.PrivateKey, c *musterpb.Commit) {
	c.Signature = ed25519.Sign(key, commitMessage(c))
}

// CheckCommit checks the form of c and its signature by the worker.
func CheckCommit(key ed25519.PublicKey, c *musterpb.Commit) error {
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
	if len(key) != ed25519.PublicKeySize || !ed25519.Verify(key, commitMessage(c), c.Signature) {
		return api.Errorf(api.Denied, "result of %s: the signature is not by the worker that ran it", c.Attempt)
	}
	return nil
}

func appendBytes(b, part []byte) []byte {
	return append(binary.BigEndian.AppendUint64(b, uint64(len(part))), part...)
}

func writeBytes(h hash.Hash, part []byte) {
	h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
	h.Write(part)
}
