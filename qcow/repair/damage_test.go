package repair_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// damager damages images of one kind.
type damager struct {
	h     *format.Header
	words map[string][]int
	names []string
}

func newDamager(image []byte) *damager {
	h, err := format.DecodeHeader(image)
	if err != nil {
		panic(err) // of a valid image
	}
	d := &damager{h: h, words: words(image)}
	for name := range d.words {
		d.names = append(d.names, name)
	}
	slices.Sort(d.names)
	return d
}

// refcounts damages what refcounts are stored in, which no content depends on.
func (d *damager) refcounts(image []byte, rng *rand.Rand) ([]byte, string) {
	table, blocks := d.words["refcount table"], d.words["refcount block"]
	switch rng.IntN(8) {
	case 0:
		off := rng.IntN(48/8) * 2
		binary.BigEndian.PutUint16(image[48+off%12:], uint16(rng.Uint32()))
		return image, fmt.Sprintf("header field at %d", 48+off%12)
	case 1:
		for _, off := range table {
			clear(image[off : off+8])
		}
		return image, "no refcount table"
	case 2:
		for _, off := range blocks {
			clear(image[off : off+8])
		}
		return image, "no refcounts"
	case 3:
		return d.flip(image, rng, "refcount table")
	case 4:
		for _, off := range blocks {
			binary.BigEndian.PutUint64(image[off:], rng.Uint64())
		}
		return image, "random refcounts"
	default:
		return d.flip(image, rng, "refcount block")
	}
}

// leaks raises refcounts.
func (d *damager) leaks(image []byte, rng *rand.Rand) ([]byte, string) {
	blocks := d.words["refcount block"]
	most := min(uint64(len(image))>>d.h.ClusterBits, d.h.BlockEntries())
	b := image[blocks[0]:][:d.h.ClusterSize()]
	var free []uint64
	for i := range most {
		if format.Refcount(b, d.h.RefcountOrder, i) == 0 {
			free = append(free, i)
		}
	}
	// A few behind the end as well, as a crash leaves them.
	for i := most; i < min(most+5, d.h.BlockEntries()); i++ {
		free = append(free, i)
	}
	if len(free) == 0 {
		return image, "nothing"
	}
	i, v := free[rng.IntN(len(free))], 1+rng.Uint64N(min(d.h.MaxRefcount(), 1<<20))
	format.PutRefcount(b, d.h.RefcountOrder, i, v)
	return image, fmt.Sprintf("refcount %d is %d", i, v)
}

// anything damages one place of any table.
func (d *damager) anything(image []byte, rng *rand.Rand) ([]byte, string) {
	switch rng.IntN(12) {
	case 0:
		n := 1 + rng.IntN(len(image)/8)
		return image[:len(image)-n], fmt.Sprintf("cut by %d bytes", n)
	case 1:
		return d.refcounts(image, rng)
	case 2:
		if d.h.Version > 2 {
			image[79] |= byte(1 + rng.IntN(3))
			return image, "marked"
		}
		fallthrough
	default:
		return d.flip(image, rng, d.names[rng.IntN(len(d.names))])
	}
}

// flip changes a word of a table.
func (d *damager) flip(image []byte, rng *rand.Rand, name string) ([]byte, string) {
	words := d.words[name]
	i := rng.IntN(len(words))
	if rng.IntN(5) > 0 { // most are 0: prefer one that is not
		for start := i; start >= 0 && words[start]+8 <= len(image) && format.Entry(image[words[start]:], 0) == 0; start-- {
			i = start
		}
		i = max(i-1, 0)
	}
	if words[i]+8 > len(image) {
		return image, "nothing"
	}
	word := image[words[i]:]
	old := format.Entry(word, 0)
	v := old
	switch rng.IntN(8) {
	case 0:
		v = 0
	case 1: // what another word has
		if from := words[rng.IntN(len(words))]; from+8 <= len(image) {
			v = format.Entry(image[from:], 0)
		}
	case 2: // a pointer to some other cluster
		v = rng.Uint64N(uint64(len(image))>>d.h.ClusterBits+3)<<d.h.ClusterBits | old&(1<<63)
	default:
		v ^= 1 << rng.IntN(64)
	}
	format.PutEntry(word, 0, v)
	return image, fmt.Sprintf("%s at %#x: %#x -> %#x", name, words[i], old, v)
}
