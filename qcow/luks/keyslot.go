package luks

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// KeyOptions are the properties of a new key slot.
type KeyOptions struct {
	// IterTime is how long a thread of this machine shall work on one passphrase; default 2 s. The count that this comes
	// to is measured, at least MinIterations and at most MaxIterations.
	IterTime time.Duration
	// Iterations is the count itself, from MinIterations to MaxIterations; 0: IterTime says.
	Iterations uint32
	// Random is where keys and salts come from; default crypto/rand. Only tests need another.
	Random io.Reader
}

// DefaultIterTime is the default of KeyOptions.IterTime, as in QEMU.
const DefaultIterTime = 2 * time.Second

func (o KeyOptions) random() io.Reader {
	if o.Random == nil {
		return rand.Reader
	}
	return o.Random
}

// iterations returns the PBKDF2 count for a key slot.
func (o KeyOptions) iterations(ctx context.Context, a algorithm) (uint32, error) {
	switch n, d := o.Iterations, o.IterTime; {
	case n != 0 && (n < MinIterations || n > MaxIterations):
		return 0, format.Invalidf("%d iterations are not within %d and %d", n, MinIterations, MaxIterations)
	case n != 0:
		return n, nil
	case d < 0:
		return 0, format.Invalidf("iteration time %v is negative", d)
	case d == 0:
		return calibrate(ctx, a.newHash, a.keyBytes, DefaultIterTime)
	default:
		return calibrate(ctx, a.newHash, a.keyBytes, d)
	}
}

// Write is a change of a header: Data replaces the bytes at Offset.
type Write struct {
	Offset uint64 // bytes from the start of the header
	Data   []byte
}

// AddKey returns the writes that make the first inactive key slot open with a new passphrase, and the number of the
// slot. b holds the header with its key material and stays as it is; passphrase is one that opens it. Errors are
// those of Open, and ErrInvalid if there is no inactive slot, the new passphrase is empty, or the options are wrong.
// Package documentation, "Order of changes", says how to make the writes.
func AddKey(ctx context.Context, b, passphrase, added []byte, o KeyOptions) (writes []Write, slot int, err error) {
	h, _, key, err := unlock(ctx, b, passphrase)
	if err != nil {
		return nil, 0, err
	}
	defer clear(key)
	for slot < Slots && h.KeySlots[slot].Active {
		slot++
	}
	if slot == Slots {
		return nil, 0, format.Invalidf("all key slots are in use")
	}
	if err := h.checkMaterial(slot); err != nil {
		return nil, 0, err
	}
	iterations, err := o.iterations(ctx, h.alg)
	if err != nil {
		return nil, 0, err
	}
	writes, err = h.activate(ctx, slot, key, added, iterations, o.random())
	return writes, slot, err
}

// RemoveKey returns the writes after which an active key slot opens no more, and what it stored is overwritten. b
// holds the header; the key material is not read. It fails with ErrInvalid if the slot is inactive, or the last
// active one: without it the data would be lost. [FindKey] tells the slot of a passphrase. Random is where the bytes
// written over the key material come from; nil means crypto/rand.
func RemoveKey(b []byte, slot int, random io.Reader) ([]Write, error) {
	h, err := decode(b)
	if err != nil {
		return nil, err
	}
	if slot < 0 || slot >= Slots || !h.KeySlots[slot].Active {
		return nil, format.Invalidf("key slot %d is not active", slot)
	}
	active := 0
	for _, s := range h.KeySlots {
		if s.Active {
			active++
		}
	}
	if active == 1 {
		return nil, format.Invalidf("key slot %d is the only active one: nothing could decrypt the image any more", slot)
	}
	if err := h.checkMaterial(slot); err != nil {
		return nil, err
	}
	s := h.KeySlots[slot]
	garbage := make([]byte, h.materialBytes(slot))
	if _, err := io.ReadFull(KeyOptions{Random: random}.random(), garbage); err != nil {
		return nil, fmt.Errorf("random bytes over the key material: %w", err)
	}
	descriptor := make([]byte, slotBytes)
	putInactive(descriptor, s.KeyOffset, s.Stripes)
	return []Write{
		{slotAt(slot), descriptor[:slotIterationsAt]}, // the state alone: a descriptor may lie in two sectors
		{slotAt(slot), descriptor},
		{s.KeyOffset, garbage},
	}, nil
}

// activate returns the writes that make slot i, which is inactive, hold the master key for a passphrase: first all
// that belongs to it, then its state, which lies in one sector.
func (h *header) activate(
	ctx context.Context, i int, key, passphrase []byte, iterations uint32, random io.Reader,
) ([]Write, error) {
	if len(passphrase) == 0 {
		return nil, format.Invalidf("the passphrase is empty")
	}
	s := h.KeySlots[i]
	descriptor := make([]byte, slotBytes)
	putInactive(descriptor, s.KeyOffset, s.Stripes)
	binary.BigEndian.PutUint32(descriptor[slotIterationsAt:], iterations)
	salt := descriptor[slotSaltAt:][:saltBytes]
	if _, err := io.ReadFull(random, salt); err != nil {
		return nil, fmt.Errorf("random salt: %w", err)
	}
	c, err := h.slotCipher(ctx, passphrase, salt, iterations)
	if err != nil {
		return nil, err
	}
	material := make([]byte, h.materialBytes(i))
	if err := split(material[:len(key)*int(s.Stripes)], key, h.alg.newHash(), random); err != nil {
		clear(material)
		return nil, err
	}
	c.Encrypt(material, 0)
	return []Write{
		{s.KeyOffset, material},
		{slotAt(i), descriptor},
		{slotAt(i), binary.BigEndian.AppendUint32(nil, slotActive)},
	}, nil
}

// putInactive writes the descriptor of a key slot without a key.
func putInactive(b []byte, keyOffset uint64, stripes uint32) {
	clear(b)
	binary.BigEndian.PutUint32(b, slotInactive)
	binary.BigEndian.PutUint32(b[slotOffsetAt:], uint32(keyOffset/SectorSize))
	binary.BigEndian.PutUint32(b[slotStripesAt:], stripes)
}
