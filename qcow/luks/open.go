package luks

import (
	"context"
	"crypto/subtle"
)

// Open finds the key slot that the passphrase opens and returns the cipher of the disk. b holds the header with its
// key material. It fails with ErrPassphrase if there is no such slot, with ErrCorrupt and ErrUnsupported as [Inspect]
// does, and with the cause of ctx when that ends: each active slot takes as long as it was made to, usually seconds.
func Open(ctx context.Context, b, passphrase []byte) (*Cipher, *Info, error) {
	h, _, key, err := unlock(ctx, b, passphrase)
	if err != nil {
		return nil, nil, err
	}
	defer clear(key)
	c, err := h.alg.newCipher(key)
	if err != nil {
		return nil, nil, err
	}
	return c, &h.Info, nil
}

// FindKey returns the number of the first key slot that the passphrase opens. Its errors are those of Open.
func FindKey(ctx context.Context, b, passphrase []byte) (slot int, err error) {
	_, slot, key, err := unlock(ctx, b, passphrase)
	clear(key)
	return slot, err
}

// unlock returns the decoded header, the slot that the passphrase opens, and the master key, which the caller clears.
func unlock(ctx context.Context, b, passphrase []byte) (h *header, slot int, key []byte, err error) {
	if h, err = decode(b); err != nil {
		return nil, 0, nil, err
	}
	if err := h.checkUsable(); err != nil {
		return nil, 0, nil, err
	}
	for i, s := range h.KeySlots {
		if !s.Active {
			continue
		}
		key, err := h.masterKey(ctx, i, passphrase)
		if err != nil {
			return nil, 0, nil, err
		}
		if key != nil {
			return h, i, key, nil
		}
	}
	return nil, 0, nil, ErrPassphrase
}

// checkUsable checks what decode, which has only the prefix, can't: that every active slot can be tried.
func (h *header) checkUsable() error {
	if err := h.alg.check(); err != nil {
		return err
	}
	if h.MasterKeyIterations > MaxIterations {
		return unsupportedf(masterIterationsAt, "%d iterations for the digest of the master key", h.MasterKeyIterations)
	}
	for i, s := range h.KeySlots {
		if !s.Active {
			continue
		}
		if s.Iterations > MaxIterations {
			return unsupportedf(slotAt(i), "%d iterations in key slot %d", s.Iterations, i)
		}
		if err := h.checkMaterial(i); err != nil {
			return err
		}
	}
	return nil
}

// checkMaterial checks that the key material of slot i is there.
func (h *header) checkMaterial(i int) error {
	if end := h.KeySlots[i].KeyOffset + h.materialBytes(i); end > uint64(len(h.raw)) {
		return corruptf(slotAt(i), "key material of slot %d ends at %d, the header at %d", i, end, len(h.raw))
	}
	return nil
}

// slotCipher returns the cipher of the key material of a slot: its key comes from the passphrase.
func (h *header) slotCipher(ctx context.Context, passphrase, salt []byte, iterations uint32) (*Cipher, error) {
	key, err := derive(ctx, h.alg.newHash, passphrase, salt, iterations, h.alg.keyBytes)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	return h.alg.newCipher(key)
}

// masterKey returns the master key from slot i, which the caller clears, or nil if the passphrase does not open the
// slot.
func (h *header) masterKey(ctx context.Context, i int, passphrase []byte) ([]byte, error) {
	s := h.KeySlots[i]
	c, err := h.slotCipher(ctx, passphrase, h.slotSalt(i), s.Iterations)
	if err != nil {
		return nil, err
	}
	material := make([]byte, h.materialBytes(i))
	defer clear(material)
	copy(material, h.raw[s.KeyOffset:])
	c.Decrypt(material, 0)
	key := make([]byte, h.alg.keyBytes)
	join(key, material[:h.alg.keyBytes*int(s.Stripes)], h.alg.newHash())

	digest, err := derive(ctx, h.alg.newHash, key, h.salt(), h.MasterKeyIterations, digestBytes)
	if err != nil {
		clear(key)
		return nil, err
	}
	if subtle.ConstantTimeCompare(digest, h.digest()) != 1 {
		clear(key)
		return nil, nil
	}
	return key, nil
}
