package luks

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"io"
)

// CreateOptions are the properties of a new header. The zero value of each field asks for what QEMU takes by default.
type CreateOptions struct {
	Cipher      string // "aes-128", "aes-192", "aes-256" (default), or the same of twofish
	Mode        string // "xts" (default) or "cbc", which new headers don't have with 192 bits
	IVGenerator string // "plain64" (default), "plain", which repeats itself every 2 TiB, or, in mode cbc only, "essiv"
	IVHash      string // of "essiv" only: "sha256" (default)
	Hash        string // "sha256" (default), "sha1", "sha224", "sha384", "sha512" or "ripemd160"

	KeyOptions // of the first key slot
}

const (
	defaultStripes = 4000
	keyAlignment   = 4096 // of key material, which begins there
)

// algorithm checks the options and returns what they name.
func (o CreateOptions) algorithm() (algorithm, error) {
	var a algorithm
	a.mode = cmp.Or(o.Mode, modeXTS)
	if name := cmp.Or(o.Cipher, "aes-256"); !a.setName(name) {
		return a, unsupportedf(cipherNameAt, "cipher %q", name)
	}
	a.hash = cmp.Or(o.Hash, "sha256")
	if a.iv = cmp.Or(o.IVGenerator, ivPlain64); a.iv == ivESSIV {
		a.ivHash = cmp.Or(o.IVHash, "sha256")
	}
	if err := a.check(); err != nil {
		return a, err
	}
	if a.keyBytes*defaultStripes%SectorSize != 0 {
		// 192 bits in mode cbc. Open reads it, but QEMU's tools crash on key material that ends within a sector.
		return a, unsupportedf(keyBytesAt, "%s in mode %s for a new header", a.name(), a.mode)
	}
	return a, nil
}

// slotSpan returns the distance of two slots' key material in a new header.
func (a algorithm) slotSpan() uint64 {
	return roundUp(uint64(a.keyBytes)*defaultStripes, keyAlignment)
}

// HeaderSize returns how many bytes a header with these options has, key material included: a multiple of 4096.
// Unknown algorithms are of class ErrUnsupported.
func HeaderSize(o CreateOptions) (uint64, error) {
	a, err := o.algorithm()
	if err != nil {
		return 0, err
	}
	return keyAlignment + Slots*a.slotSpan(), nil
}

// Create returns a new header of HeaderSize bytes, laid out as QEMU does, and the cipher of the disk. Key slot 0
// holds the passphrase. QEMU opens the result only if the passphrase is UTF-8 without zero bytes. Unless the options
// give a number of iterations, Create takes about twice the time it shall take to open the header.
func Create(ctx context.Context, passphrase []byte, o CreateOptions) ([]byte, *Cipher, error) {
	a, err := o.algorithm()
	if err != nil {
		return nil, nil, err
	}
	iterations, err := o.iterations(ctx, a)
	if err != nil {
		return nil, nil, err
	}
	return create(ctx, a, passphrase, iterations, o.random())
}

func create(
	ctx context.Context, a algorithm, passphrase []byte, iterations uint32, random io.Reader,
) ([]byte, *Cipher, error) {
	key := make([]byte, a.keyBytes)
	defer clear(key)
	if _, err := io.ReadFull(random, key); err != nil {
		return nil, nil, fmt.Errorf("random master key: %w", err)
	}
	c, err := a.newCipher(key)
	if err != nil {
		return nil, nil, err
	}

	b := make([]byte, keyAlignment+Slots*a.slotSpan())
	copy(b, magic)
	binary.BigEndian.PutUint16(b[versionAt:], version)
	copy(b[cipherNameAt:], a.cipher)
	copy(b[cipherModeAt:], a.spec())
	copy(b[hashAt:], a.hash)
	binary.BigEndian.PutUint32(b[payloadAt:], uint32(len(b)/SectorSize))
	binary.BigEndian.PutUint32(b[keyBytesAt:], uint32(a.keyBytes))
	// An eighth of the slot's: a wrong passphrase is found out with one digest for each of eight slots.
	masterIterations := max(iterations/Slots, MinIterations)
	binary.BigEndian.PutUint32(b[masterIterationsAt:], masterIterations)
	if err := putUUID(b[uuidAt:][:uuidBytes], random); err != nil {
		return nil, nil, err
	}
	for i := range Slots {
		putInactive(b[slotAt(i):][:slotBytes], keyAlignment+uint64(i)*a.slotSpan(), defaultStripes)
	}
	h, err := decode(b)
	if err != nil {
		return nil, nil, err
	}
	if _, err := io.ReadFull(random, h.salt()); err != nil {
		return nil, nil, fmt.Errorf("random salt: %w", err)
	}
	digest, err := derive(ctx, a.newHash, key, h.salt(), masterIterations, digestBytes)
	if err != nil {
		return nil, nil, err
	}
	copy(h.digest(), digest)
	writes, err := h.activate(ctx, 0, key, passphrase, iterations, random)
	if err != nil {
		return nil, nil, err
	}
	for _, w := range writes {
		copy(b[w.Offset:], w.Data)
	}
	return b, c, nil
}

// putUUID writes a random UUID (RFC 9562, version 4) as text.
func putUUID(b []byte, random io.Reader) error {
	var u [16]byte
	if _, err := io.ReadFull(random, u[:]); err != nil {
		return fmt.Errorf("random UUID: %w", err)
	}
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	copy(b, fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:]))
	return nil
}
