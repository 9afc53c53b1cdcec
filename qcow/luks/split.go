package luks

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
)

// The anti-forensic splitter (specification, "Anti-forensic information splitting"): of n stripes, each as long as
// the key, all but the last are random, and the last is such that all together give the key. Between stripes the
// state is diffused with a hash.

// split fills stripes with what join joins to key. Its length is a multiple of the key's.
func split(stripes, key []byte, h hash.Hash, random io.Reader) error {
	last := stripes[len(stripes)-len(key):]
	if _, err := io.ReadFull(random, stripes[:len(stripes)-len(key)]); err != nil {
		return fmt.Errorf("random stripes: %w", err)
	}
	clear(last)
	state := make([]byte, len(key))
	defer clear(state)
	join(state, stripes, h) // ends with the state of the others, the last being zeroes
	subtle.XORBytes(last, state, key)
	return nil
}

// join sets key to what was split into stripes.
func join(key, stripes []byte, h hash.Hash) {
	clear(key)
	for ; len(stripes) > len(key); stripes = stripes[len(key):] {
		subtle.XORBytes(key, key, stripes)
		diffuse(key, h)
	}
	subtle.XORBytes(key, key, stripes)
}

// diffuse replaces each piece of b that is as long as a digest, the last one being perhaps shorter, by the digest of
// its number and itself.
func diffuse(b []byte, h hash.Hash) {
	var number [4]byte
	digest := make([]byte, 0, h.Size())
	for i := uint32(0); len(b) > 0; i++ {
		n := min(len(b), h.Size())
		binary.BigEndian.PutUint32(number[:], i)
		h.Reset()
		h.Write(number[:])
		h.Write(b[:n])
		copy(b[:n], h.Sum(digest))
		b = b[n:]
	}
}
