package qcow

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Journal is memory that outlives the process and not the machine, and belongs to one image file ([storage.Journal]).
type Journal interface {
	// Load returns a copy of the memory.
	Load() []byte
	// Store copies b to off. Stores are there in their order, whenever the process dies; one of 8 bytes at a multiple of 8 is there as a whole or
	// not at all.
	Store(off int, b []byte)
	// Close gives the memory up. What is in it stays.
	Close() error
	// Remove gives the memory up, with what is in it. It is called instead of Close when the image was closed clean, and is still locked.
	Remove() error
}

// A journal has two banks of the same length. While the links in one of them are written to the image file, new ones go to the other. All numbers
// are little-endian:
//
//	bank:   0 generation, 8..63 zero, then records of 64 bytes
//	record: 0 seal, 8 guest offset of the cluster, 16 host offset of the L2 entry, 24 old entry, 40 new entry, 56 zero
//
// A seal is made from the record and the generation of its bank, and stored last. So a record that was torn by a kill has none that is valid, and
// one store of another generation makes all records of a bank void. Records are valid up to the first that is not. The generations of both
// banks are never alike, and the links in the bank with the greater one are younger.
const (
	journalBanks  = 2
	journalRecord = 64
)

// heldLink is a change of an L2 entry that is not in the image file yet.
type heldLink struct {
	guest    format.GuestOffset // of the cluster
	at       format.HostOffset  // of the entry
	old, new format.MappingEntry
}

// bankBytes returns how long each bank is of a journal of so many bytes.
func bankBytes(n int) int { return n / journalBanks / journalRecord * journalRecord }

// encode fills a record but for the seal, which it returns.
func (l *heldLink) encode(b *[journalRecord]byte, generation uint64) (seal uint64) {
	for i, v := range [...]uint64{
		0, uint64(l.guest), uint64(l.at), uint64(l.old.L2Entry), uint64(l.old.Subclusters), uint64(l.new.L2Entry), uint64(l.new.Subclusters), 0,
	} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
	return sealOf(b[8:], generation)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sealOf returns the seal of a record.
func sealOf(body []byte, generation uint64) uint64 {
	return uint64(crc32.Checksum(body, castagnoli))<<32 | generation&0xffffffff
}

// decodeJournal returns the links of a journal, oldest first, which bank is the older one, and a generation that is greater than all in it.
func decodeJournal(b []byte) (links []heldLink, older int, next uint64) {
	var banks [journalBanks][]byte
	var generations [journalBanks]uint64
	for i := range banks {
		banks[i] = b[i*bankBytes(len(b)):][:bankBytes(len(b))]
		generations[i] = binary.LittleEndian.Uint64(banks[i])
		next = max(next, generations[i]+1)
	}
	if generations[1] < generations[0] {
		older = 1
	}
	for _, i := range [...]int{older, 1 - older} {
		links = appendRecords(links, banks[i][journalRecord:], generations[i])
	}
	return links, older, next
}

func appendRecords(links []heldLink, b []byte, generation uint64) []heldLink {
	for len(b) >= journalRecord {
		word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
		if word(0) != sealOf(b[8:journalRecord], generation) {
			break
		}
		links = append(links, heldLink{
			guest: format.GuestOffset(word(1)),
			at:    format.HostOffset(word(2)),
			old:   format.MappingEntry{L2Entry: format.L2Entry(word(3)), Subclusters: format.Subclusters(word(4))},
			new:   format.MappingEntry{L2Entry: format.L2Entry(word(5)), Subclusters: format.Subclusters(word(6))},
		})
		b = b[journalRecord:]
	}
	return links
}
