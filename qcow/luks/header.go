package luks

import (
	"bytes"
	"encoding/binary"
)

// On-disk layout (specification, "PHDR" and "Key slot" figures). All integers are big endian.
const (
	magic   = "LUKS\xba\xbe"
	version = 1

	versionAt          = 6
	cipherNameAt       = 8
	cipherModeAt       = 40
	hashAt             = 72
	payloadAt          = 104 // in sectors
	keyBytesAt         = 108
	digestAt           = 112
	saltAt             = 132
	masterIterationsAt = 164
	uuidAt             = 168
	slotsAt            = 208

	nameBytes   = 32
	digestBytes = 20
	saltBytes   = 32
	uuidBytes   = 40

	slotBytes        = 48
	slotIterationsAt = 4 // in the slot
	slotSaltAt       = 8
	slotOffsetAt     = 40 // in sectors
	slotStripesAt    = 44

	slotActive   = 0x00ac71f3
	slotInactive = 0x0000dead
)

const (
	// PrefixBytes is the length of a header without the key material: what Inspect needs.
	PrefixBytes = slotsAt + Slots*slotBytes

	// MaxHeaderBytes is how much of an image is worth reading as its header, whatever the image says: eight times what
	// QEMU's largest has.
	MaxHeaderBytes = 16 << 20

	// Slots is the number of key slots, in use or not.
	Slots = 8

	// MaxIterations is the largest PBKDF2 count accepted, thirty times what QEMU takes by default on a fast machine. It
	// means about a minute of work for each slot that is tried, so that the attempt to open a hostile header ends, if
	// late.
	MaxIterations = 1 << 28

	// MinIterations is the smallest PBKDF2 count of a new key slot, as the specification demands.
	MinIterations = 1000
)

// Info is what a header tells without a passphrase.
type Info struct {
	Cipher      string // with the key size in bits: "aes-256"
	Mode        string // "xts" or "cbc"
	IVGenerator string // "plain", "plain64" or "essiv"
	IVHash      string // of "essiv"; empty otherwise, unless the header names one that means nothing
	Hash        string // "sha256", ...

	PayloadOffset       uint64 // bytes; where the data of a LUKS device begins, in a qcow2 image the header's length
	KeyBytes            uint32 // length of the master key
	MasterKeyIterations uint32 // of the master key digest
	UUID                string

	KeySlots [Slots]KeySlot
}

// KeySlot is one of the places for a passphrase.
type KeySlot struct {
	Active     bool
	Iterations uint32 // of PBKDF2; without meaning if inactive
	KeyOffset  uint64 // bytes from the start of the header to the key material
	Stripes    uint32 // key material is Stripes times the master key
}

// header is a decoded header. Its slot offsets, digest and salts are read from raw.
type header struct {
	raw []byte
	alg algorithm
	Info
}

// Inspect decodes and checks a header, of which PrefixBytes are enough: the key material is not looked at. Errors are of
// class ErrCorrupt, or ErrUnsupported if Open would refuse the algorithms; an Info comes with the latter nevertheless.
func Inspect(b []byte) (*Info, error) {
	h, err := decode(b)
	if err != nil {
		return nil, err
	}
	return &h.Info, h.alg.check()
}

// decode decodes a header of which at least the prefix is there, and checks all but that the algorithms are implemented.
func decode(b []byte) (*header, error) {
	if len(b) < len(magic) || string(b[:len(magic)]) != magic {
		return nil, corruptf(0, "wrong magic")
	}
	if len(b) < PrefixBytes {
		return nil, corruptf(0, "ends after %d bytes", len(b))
	}
	if v := binary.BigEndian.Uint16(b[versionAt:]); v != version {
		return nil, unsupportedf(versionAt, "version %d", v)
	}
	h := &header{raw: b}
	names := make(map[int]string)
	for _, at := range []int{cipherNameAt, cipherModeAt, hashAt} {
		name, _, ended := bytes.Cut(b[at:at+nameBytes], []byte{0})
		if !ended {
			return nil, corruptf(uint64(at), "name without an end")
		}
		names[at] = string(name)
	}
	h.alg = algorithm{cipher: names[cipherNameAt], hash: names[hashAt]}
	h.alg.setSpec(names[cipherModeAt])
	h.KeyBytes = binary.BigEndian.Uint32(b[keyBytesAt:])
	if h.KeyBytes == 0 || h.KeyBytes > 1024 { // a cipher that this package does not have may need more than those that it has
		return nil, corruptf(keyBytesAt, "master key of %d bytes", h.KeyBytes)
	}
	h.alg.keyBytes = int(h.KeyBytes)
	h.Cipher, h.Mode, h.IVGenerator, h.IVHash, h.Hash = h.alg.name(), h.alg.mode, h.alg.iv, h.alg.ivHash, h.alg.hash

	h.PayloadOffset = uint64(binary.BigEndian.Uint32(b[payloadAt:])) * SectorSize
	h.MasterKeyIterations = binary.BigEndian.Uint32(b[masterIterationsAt:])
	if h.MasterKeyIterations == 0 {
		return nil, corruptf(masterIterationsAt, "no iterations for the digest of the master key")
	}
	uuid, _, _ := bytes.Cut(b[uuidAt:uuidAt+uuidBytes], []byte{0})
	h.UUID = string(uuid)
	for i := range h.KeySlots {
		if err := h.decodeSlot(i); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// decodeSlot decodes slot i, those before it being decoded. Inactive slots are checked too: AddKey will write there.
func (h *header) decodeSlot(i int) error {
	at, b := slotAt(i), h.slot(i)
	state := binary.BigEndian.Uint32(b)
	if state != slotActive && state != slotInactive {
		return corruptf(at, "key slot %d is neither active nor inactive: %#x", i, state)
	}
	s := KeySlot{
		Active:     state == slotActive,
		Iterations: binary.BigEndian.Uint32(b[slotIterationsAt:]),
		KeyOffset:  uint64(binary.BigEndian.Uint32(b[slotOffsetAt:])) * SectorSize,
		Stripes:    binary.BigEndian.Uint32(b[slotStripesAt:]),
	}
	h.KeySlots[i] = s
	end := s.KeyOffset + h.materialBytes(i)
	switch {
	case s.Active && s.Iterations == 0:
		return corruptf(at, "key slot %d has no iterations", i)
	case s.Stripes == 0:
		return corruptf(at, "key slot %d has no stripes", i)
	case s.KeyOffset < PrefixBytes:
		return corruptf(at, "key material of slot %d at %d overlaps the header", i, s.KeyOffset)
	case end > h.PayloadOffset:
		return corruptf(at, "key material of slot %d ends at %d, behind the payload offset %d", i, end, h.PayloadOffset)
	}
	for j, other := range h.KeySlots[:i] {
		if s.KeyOffset < other.KeyOffset+h.materialBytes(j) && other.KeyOffset < end {
			return corruptf(at, "key material of slots %d and %d overlaps", j, i)
		}
	}
	return nil
}

// materialBytes returns the length of a slot's key material, a whole number of sectors.
func (h *header) materialBytes(i int) uint64 {
	return roundUp(uint64(h.KeyBytes)*uint64(h.KeySlots[i].Stripes), SectorSize)
}

func slotAt(i int) uint64 { return uint64(slotsAt + i*slotBytes) }

func (h *header) slot(i int) []byte     { return h.raw[slotAt(i):][:slotBytes] }
func (h *header) slotSalt(i int) []byte { return h.slot(i)[slotSaltAt:][:saltBytes] }
func (h *header) salt() []byte          { return h.raw[saltAt:][:saltBytes] }
func (h *header) digest() []byte        { return h.raw[digestAt:][:digestBytes] }

// roundUp returns the smallest multiple of unit, a power of two, that is not below n.
func roundUp(n, unit uint64) uint64 { return (n + unit - 1) &^ (unit - 1) }
