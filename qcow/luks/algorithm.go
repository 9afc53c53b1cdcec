package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha1" //nolint:gosec // headers made by cryptsetup before 1.7 use it for PBKDF2, where its collisions do no harm
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ripemd160" //nolint:staticcheck,gosec // deprecated for new designs; this reads old headers
	"golang.org/x/crypto/twofish"   //nolint:staticcheck // as above
	"golang.org/x/crypto/xts"
)

// hashes are the implemented hash functions, by their names in a header.
var hashes = map[string]func() hash.Hash{
	"ripemd160": ripemd160.New,
	"sha1":      sha1.New,
	"sha224":    sha256.New224,
	"sha256":    sha256.New,
	"sha384":    sha512.New384,
	"sha512":    sha512.New,
}

// blockCiphers are the implemented ciphers, by their names in a header. All have blocks of 16 bytes and
// take keys of 16, 24 and 32 bytes.
var blockCiphers = map[string]func(key []byte) (cipher.Block, error){
	"aes":     aes.NewCipher,
	"twofish": func(key []byte) (cipher.Block, error) { return twofish.NewCipher(key) },
}

// Modes and IV generators.
const (
	modeCBC = "cbc"
	modeXTS = "xts"

	ivPlain   = "plain"   // sector number, 32 bits, little endian
	ivPlain64 = "plain64" // sector number, 64 bits, little endian
	ivESSIV   = "essiv"   // plain64 encrypted with the hash of the key
)

// algorithm says how sectors are encrypted, in the terms of a header.
type algorithm struct {
	cipher   string // "aes"
	keyBytes int    // of the master key: two cipher keys in mode xts, else one
	mode     string
	iv       string // IV generator
	ivHash   string // of ivESSIV; otherwise it means nothing
	hash     string // of PBKDF2 and of the split key material
}

// spec returns mode and IV generator as a header has them: "xts-plain64", "cbc-essiv:sha256".
func (a algorithm) spec() string {
	s := a.mode + "-" + a.iv
	if a.ivHash != "" {
		s += ":" + a.ivHash
	}
	return s
}

// setSpec is the opposite of spec.
func (a *algorithm) setSpec(spec string) {
	a.mode, a.iv, _ = strings.Cut(spec, "-")
	a.iv, a.ivHash, _ = strings.Cut(a.iv, ":")
}

// cipherKeyBytes returns the length of one cipher key.
func (a algorithm) cipherKeyBytes() int {
	if a.mode == modeXTS {
		return a.keyBytes / 2
	}
	return a.keyBytes
}

// name returns the cipher with its key size: "aes-256".
func (a algorithm) name() string { return a.cipher + "-" + strconv.Itoa(a.cipherKeyBytes()*8) }

// setName is the opposite of name; it needs the mode. It reports whether name has that form.
func (a *algorithm) setName(name string) bool {
	alg, size, _ := strings.Cut(name, "-")
	bits, err := strconv.Atoi(size)
	if err != nil || bits <= 0 || bits > 1024 || bits%8 != 0 {
		return false
	}
	a.cipher, a.keyBytes = alg, bits/8
	if a.mode == modeXTS {
		a.keyBytes *= 2
	}
	return true
}

// check returns an error of class ErrUnsupported unless newCipher and newHash work.
func (a algorithm) check() error {
	switch {
	case blockCiphers[a.cipher] == nil:
		return unsupportedf(cipherNameAt, "cipher %q", a.cipher)
	case a.mode != modeXTS && a.mode != modeCBC:
		return unsupportedf(cipherModeAt, "cipher mode %q", a.mode)
	case a.iv != ivPlain && a.iv != ivPlain64 && a.iv != ivESSIV:
		return unsupportedf(cipherModeAt, "IV generator %q", a.iv)
	case hashes[a.hash] == nil:
		return unsupportedf(hashAt, "hash %q", a.hash)
	}
	if !slices.Contains([]int{16, 24, 32}, a.cipherKeyBytes()) || a.mode == modeXTS && a.keyBytes%2 != 0 {
		return unsupportedf(keyBytesAt, "master key of %d bytes for %s in mode %s", a.keyBytes, a.cipher, a.mode)
	}
	switch {
	case a.iv != ivESSIV:
		return nil
	case a.mode != modeCBC: // XTS hides the sector number already
		return unsupportedf(cipherModeAt, "IV generator %q in mode %s", a.iv, a.mode)
	}
	if hashes[a.ivHash] == nil {
		return unsupportedf(cipherModeAt, "hash %q of the IV generator", a.ivHash)
	}
	if n := hashes[a.ivHash]().Size(); !slices.Contains([]int{16, 24, 32}, n) { // the digest is the key
		return unsupportedf(cipherModeAt, "hash %q of the IV generator: no key of %s has %d bytes", a.ivHash, a.cipher, n)
	}
	return nil
}

// newCipher returns the cipher for a master key, or for the key of a slot, of keyBytes. The algorithm has passed check.
func (a algorithm) newCipher(key []byte) (*Cipher, error) {
	newBlock := blockCiphers[a.cipher]
	c := &Cipher{shortIV: a.iv == ivPlain}
	var err error
	if a.mode == modeXTS {
		c.xts, err = xts.NewCipher(newBlock, key[:a.keyBytes])
	} else {
		c.block, err = newBlock(key[:a.keyBytes])
	}
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", a.cipher, err)
	}
	if a.iv == ivESSIV {
		h := hashes[a.ivHash]()
		h.Write(key)
		salt := h.Sum(nil)
		defer clear(salt)
		if c.essiv, err = newBlock(salt); err != nil {
			return nil, fmt.Errorf("key of the IV generator: %w", err)
		}
	}
	return c, nil
}

func (a algorithm) newHash() hash.Hash { return hashes[a.hash]() }
