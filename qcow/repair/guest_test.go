package repair_test

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"io"
	"strings"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// content is what can be read from an image: the active disk, the snapshots, and the bitmaps.
type content map[string]*disk

// disk is what the guest clusters of a disk say. One that reads as zeroes is missing.
type disk struct {
	clusters map[uint64]string
	lost     map[uint64]bool // clusters that cannot be read
	lostL2   map[uint64]bool // L2 tables that cannot be read, by their place in the L1 table
	l2Bits   uint32
}

func (d *disk) readable(n uint64) bool { return !d.lost[n] && !d.lostL2[n>>d.l2Bits] }

// contentOf reads an image independently of what is tested.
func contentOf(image []byte) content {
	h, err := format.DecodeHeader(image)
	if err != nil && len(image) > 72 && image[20]|image[21]|image[22] == 0 && image[23] < 22 {
		head := bytes.Clone(image[:min(len(image), 2<<20)]) // nothing that can be read depends on refcounts
		binary.BigEndian.PutUint64(head[48:], 1<<image[23])
		binary.BigEndian.PutUint32(head[56:], 1)
		h, err = format.DecodeHeader(head)
	}
	if err != nil {
		return nil
	}
	g := &guest{image: image, h: h}
	c := content{"": g.disk(uint64(h.L1Offset), uint64(h.L1Entries))}
	if h.Snapshots > 0 && uint64(h.SnapshotsOffset) < uint64(len(image)) {
		list, _, err := format.DecodeSnapshots(image[h.SnapshotsOffset:], h.Snapshots)
		for _, s := range list {
			l1, n := uint64(s.L1Offset), uint64(s.L1Entries)*format.EntrySize
			if l1%h.ClusterSize() == 0 && (n == 0 || l1 > 0 && l1 < uint64(len(image)) && n <= format.MaxL1Bytes) {
				c["snapshot "+s.ID+" "+s.Name] = g.disk(l1, uint64(s.L1Entries))
			}
		}
		if err != nil {
			return c
		}
	}
	if ext, err := h.Bitmaps(); err == nil && ext != nil && h.Autoclear&format.AutoclearBitmaps != 0 {
		if end := uint64(ext.DirectoryOffset) + ext.DirectorySize; end <= uint64(len(image)) {
			list, err := format.DecodeBitmaps(image[ext.DirectoryOffset:end], ext.Count)
			for i := range list {
				c["bitmap "+list[i].Name] = g.bitmap(&list[i])
			}
			if err != nil {
				return c
			}
		}
	}
	return c
}

type guest struct {
	image []byte
	h     *format.Header
}

// at returns n bytes of the file, zeroes behind its end.
func (g *guest) at(off, n uint64) []byte {
	b := make([]byte, n)
	if off < uint64(len(g.image)) {
		copy(b, g.image[off:])
	}
	return b
}

// inFile reports whether a cluster starts at off.
func (g *guest) inFile(off format.HostOffset) bool {
	return g.h.Aligned(off) && uint64(off) < uint64(len(g.image))
}

// inKeys reports whether off is in the encryption header. What a guest cluster is there nobody can say.
func (g *guest) inKeys(off format.HostOffset) bool {
	first, n, err := g.h.Encryption()
	return err == nil && off >= first && uint64(off-first) < g.h.ClustersFor(n)<<g.h.ClusterBits
}

// maxSlots is how many entries of an L1 table are looked at. The images here are shorter than longer tables.
const maxSlots = 1 << 16

func (g *guest) disk(l1, entries uint64) *disk {
	entries = min(entries, maxSlots)
	d := &disk{clusters: make(map[uint64]string), lost: make(map[uint64]bool), lostL2: make(map[uint64]bool), l2Bits: g.h.L2Bits()}
	table := g.at(l1, entries*8)
	for slot := range entries {
		e := format.L1Entry(format.Entry(table, slot))
		switch {
		case e.Offset() == 0:
			if g.h.BackingFile != "" {
				d.clusters[slot<<d.l2Bits] = "U" // for them all
			}
			continue
		case !g.inFile(e.Offset()), g.inKeys(e.Offset()):
			d.lostL2[slot] = true
			continue
		}
		l2 := g.at(uint64(e.Offset()), g.h.ClusterSize())
		for i := range g.h.L2Entries() {
			n := slot<<d.l2Bits + i
			s, ok := g.cluster(g.h.MappingEntry(l2, i), n)
			if !ok {
				d.lost[n] = true
			} else if s != "" {
				d.clusters[n] = s
			}
		}
	}
	return d
}

// cluster returns what guest cluster n says, and whether it can be read.
func (g *guest) cluster(e format.MappingEntry, n uint64) (string, bool) {
	reserved := e.Reserved()
	e.L2Entry &^= format.L2Entry(reserved)
	if g.h.ExtendedL2 && e.Kind() != format.Compressed {
		e.L2Entry &^= 1
	}
	if g.h.Version == 2 && e.L2Entry&1 != 0 && e.Kind() != format.Compressed {
		return "", false
	}
	if e.Kind() == format.Compressed {
		return g.compressed(e)
	}
	if e.Subclusters.Invalid() != 0 || uint64(e.Subclusters)&uint64(format.AllData) != 0 && !g.h.HasHost(e) {
		return "", false
	}
	var s strings.Builder
	subs, size := g.h.Subclusters(), g.h.SubclusterSize()
	for i := range subs {
		switch g.h.Kind(e, i) {
		case format.Unallocated, format.UnallocatedHost:
			if g.h.BackingFile != "" {
				s.WriteString("U")
				continue
			}
			s.WriteString("Z")
		case format.Data:
			if g.h.DataFile {
				if uint64(e.Offset()) != n<<g.h.ClusterBits { // the specification demands it, and QEMU too
					return "", false
				}
				s.WriteString("D")
				continue
			}
			if !g.inFile(e.Offset()) || g.inKeys(e.Offset()) {
				return "", false
			}
			b := g.at(uint64(e.Offset())+i*size, size)
			if g.h.CryptMethod == 2 { // the place is part of the key
				fmt.Fprintf(&s, "<%#x>", uint64(e.Offset()))
			} else if len(bytes.Trim(b, "\x00")) == 0 {
				s.WriteString("Z")
				continue
			}
			s.Write(b)
		default:
			s.WriteString("Z")
		}
	}
	if strings.Trim(s.String(), "Z") == "" {
		return "", true
	}
	return s.String(), true
}

func (g *guest) compressed(e format.MappingEntry) (string, bool) {
	off, n := e.CompressedRange(g.h.Geometry)
	if g.h.DataFile || uint64(off) >= uint64(len(g.image)) {
		return "", false
	}
	b := make([]byte, g.h.ClusterSize())
	if _, err := io.ReadFull(flate.NewReader(bytes.NewReader(g.at(uint64(off), n))), b); err != nil {
		return "", false
	}
	if len(bytes.Trim(b, "\x00")) == 0 {
		return "", true
	}
	return string(b), true
}

func (g *guest) bitmap(m *format.Bitmap) *disk {
	d := &disk{clusters: map[uint64]string{^uint64(0): fmt.Sprint(m.Flags, m.GranularityBits)}, lost: make(map[uint64]bool)}
	if uint64(m.TableEntries)*8 > uint64(len(g.image)) || !g.inFile(m.TableOffset) {
		return &disk{}
	}
	table := g.at(uint64(m.TableOffset), uint64(m.TableEntries)*8)
	for i := range uint64(m.TableEntries) {
		e := format.BitmapTableEntry(format.Entry(table, i))
		if e.Offset() != 0 {
			if !g.inFile(e.Offset()) {
				d.lost[i] = true
				continue
			}
			d.clusters[i] = string(g.at(uint64(e.Offset()), g.h.ClusterSize()))
		} else {
			d.clusters[i] = fmt.Sprint(e.AllOnes())
		}
	}
	return d
}

// lost says what of c is missing or different in later. Bitmaps may be gone, but not wrong.
func (c content) lost(later content) string {
	for name, was := range c {
		is := later[name]
		if is == nil {
			if strings.HasPrefix(name, "bitmap") {
				continue
			}
			return fmt.Sprintf("%q is gone", name)
		}
		for n, s := range was.clusters {
			if got := is.clusters[n]; got != s {
				return fmt.Sprintf("%q, cluster %d: %s, was %s", name, n, short(got), short(s))
			}
			if !is.readable(n) {
				return fmt.Sprintf("%q, cluster %d: cannot be read, was %s", name, n, short(s))
			}
		}
		for n, s := range is.clusters {
			if was.readable(n) && was.clusters[n] == "" {
				return fmt.Sprintf("%q, cluster %d: %s, was zero", name, n, short(s))
			}
		}
		for n := range is.lost {
			if was.readable(n) {
				return fmt.Sprintf("%q, cluster %d cannot be read", name, n)
			}
		}
		for n := range is.lostL2 {
			if !was.lostL2[n] {
				return fmt.Sprintf("%q, L2 table %d cannot be read", name, n)
			}
		}
	}
	return ""
}

func short(s string) string {
	if len(s) > 40 {
		s = s[:40]
	}
	return fmt.Sprintf("%q", s)
}

// words returns the offsets of the 8-byte words of the tables of a valid image, by the name of the table.
func words(image []byte) map[string][]int {
	h, err := format.DecodeHeader(image)
	if err != nil {
		return nil
	}
	w := make(map[string][]int)
	add := func(name string, off, n uint64) {
		for ; n > 0 && off+8 <= uint64(len(image)); off, n = off+8, n-1 {
			w[name] = append(w[name], int(off))
		}
	}
	l1 := func(name string, off, n uint64) {
		add(name, off, n)
		for i := range n {
			if l2 := format.L1Entry(format.Entry(image[off:], i)).Offset(); l2 != 0 {
				add("L2 table", uint64(l2), h.ClusterSize()/8)
			}
		}
	}
	l1("L1 table", uint64(h.L1Offset), uint64(h.L1Entries))
	at := uint64(h.SnapshotsOffset)
	for range h.Snapshots {
		e := image[at:]
		add("snapshot table", at, 6)
		l1("snapshot L1 table", binary.BigEndian.Uint64(e), uint64(binary.BigEndian.Uint32(e[8:])))
		at += 40 + uint64(binary.BigEndian.Uint16(e[12:])) + uint64(binary.BigEndian.Uint16(e[14:])) + uint64(binary.BigEndian.Uint32(e[36:]))
		at = (at + 7) &^ 7
	}
	if ext, err := h.Bitmaps(); err == nil && ext != nil {
		add("bitmap directory", uint64(ext.DirectoryOffset), ext.DirectorySize/8)
		add("bitmap table", binary.BigEndian.Uint64(image[ext.DirectoryOffset:]), uint64(binary.BigEndian.Uint32(image[ext.DirectoryOffset+8:])))
	}
	add("refcount table", uint64(h.RefcountTableOffset), h.RefcountTableBytes()/8)
	for i := range h.RefcountTableBytes() / 8 {
		if off := format.RefcountTableEntry(format.Entry(image[h.RefcountTableOffset:], i)).Offset(); off != 0 {
			add("refcount block", uint64(off), h.ClusterSize()/8)
		}
	}
	return w
}
