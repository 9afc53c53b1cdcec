package format_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/test/seed"
)

var essential = []uint32{format.ExtBackingFormat, format.ExtBitmaps, format.ExtFullDisk, format.ExtDataFile}

// essence is what must be the old or the new at every moment of a rewrite: all of a header but the extensions that are not
// essential.
func essence(h *format.Header) string {
	x := *h
	x.Extensions = nil
	s := fmt.Sprintf("%+v", x)
	for _, t := range essential {
		for _, e := range h.Extensions {
			if e.Type == t {
				s += fmt.Sprintf(" %#x:%q", t, e.Data)
			}
		}
	}
	return s
}

// unknown returns the extensions that nobody knows, in order.
func unknown(h *format.Header) []string {
	var list []string
	for _, e := range h.Extensions {
		if !slices.Contains(essential, e.Type) && e.Type != format.ExtFeatureNames {
			list = append(list, fmt.Sprintf("%#x:%q", e.Type, e.Data))
		}
	}
	return list
}

// crashStates calls f with every state that a crash can leave behind while data is written at off: each combination of its sectors, or
// some of them where there are too many.
func crashStates(image []byte, w format.HeaderWrite, rng *rand.Rand, f func(state []byte)) {
	const exhaustive = 12
	var cuts []int // of w.Data, into sectors
	for at := 0; at < len(w.Data); {
		cuts = append(cuts, at)
		at += format.SectorSize - (int(w.Offset)+at)%format.SectorSize
	}
	state := make([]byte, len(image))
	keep := func(kept func(i int) bool) {
		copy(state, image)
		for i, at := range cuts {
			end := len(w.Data)
			if i+1 < len(cuts) {
				end = cuts[i+1]
			}
			if kept(i) {
				copy(state[int(w.Offset)+at:], w.Data[at:end])
			}
		}
		f(state)
	}
	if len(cuts) <= exhaustive {
		for mask := range 1 << len(cuts) {
			keep(func(i int) bool { return mask>>i&1 != 0 })
		}
		return
	}
	for n := range len(cuts) + 1 {
		keep(func(i int) bool { return i < n })
		keep(func(i int) bool { return i >= n })
	}
	for range 1 << exhaustive / 8 {
		mask := []uint64{rng.Uint64(), rng.Uint64()}
		keep(func(i int) bool { return mask[i/64%2]>>(i%64)&1 != 0 })
	}
}

// rewrite turns the cluster into one with h, looking at every state that a crash can leave behind. It returns the final state,
// or nil when Rewrite refuses.
func rewrite(t testing.TB, cluster []byte, h *format.Header, rng *rand.Rand) []byte {
	t.Helper()
	was, err := format.DecodeHeader(cluster)
	if err != nil {
		t.Fatal(err)
	}
	before := *h
	writes, err := h.Rewrite(cluster)
	if err != nil {
		if !errors.Is(err, format.ErrInvalid) {
			t.Fatal(err)
		}
		return nil
	}
	if !sameHeader(&before, h) {
		t.Fatal("Rewrite changed the header")
	}
	final := bytes.Clone(cluster)
	for _, w := range writes {
		if len(w.Data) == 0 || int(w.Offset)+len(w.Data) > len(cluster) {
			t.Fatalf("write of %d bytes at %d", len(w.Data), w.Offset)
		}
		copy(final[w.Offset:], w.Data)
	}
	is, err := format.DecodeHeader(final)
	if err != nil {
		t.Fatalf("after all writes: %v", err)
	}
	// Nothing but the length of the header, the order of the extensions and the names of features may differ from what was asked for.
	want := *h
	want.HeaderLength, want.Version = is.HeaderLength, max(h.Version, 2)
	if h.Version == 0 {
		want.Version = 3
	}
	if essence(is) != essence(&want) || !slices.Equal(unknown(is), unknown(h)) {
		t.Fatalf("asked for %s %q\ngot       %s %q", essence(&want), unknown(h), essence(is), unknown(is))
	}
	if is.HeaderLength != h.HeaderLength && (h.Version == 2 || is.HeaderLength != max(112, h.HeaderLength)) && (h.Version != 2 || is.HeaderLength != 72) {
		t.Fatalf("header length %d became %d", h.HeaderLength, is.HeaderLength)
	}
	if names := h.Extension(format.ExtFeatureNames); names != nil && is.Extension(format.ExtFeatureNames) == nil {
		if all, _ := size(h); all+len(was.BackingFile)+len(h.BackingFile) <= len(cluster) && inFirstSector(was) && inFirstSector(h) {
			t.Fatal("the feature names would have had room")
		}
	}

	known := append(unknown(was), unknown(h)...)
	oldEssence, newEssence := essence(was), essence(is)
	switched := false // between two writes: what came before is durable
	state := bytes.Clone(cluster)
	for i, w := range writes {
		crashStates(state, w, rng, func(b []byte) {
			got, err := format.DecodeHeader(b)
			if err != nil {
				t.Fatalf("write %d of %d: %v", i+1, len(writes), err)
			}
			switch e := essence(got); {
			case e == newEssence:
			case e != oldEssence:
				t.Fatalf("write %d of %d:\n%s is neither\n%s nor\n%s", i+1, len(writes), e, oldEssence, newEssence)
			case switched:
				t.Fatalf("write %d of %d: back to the old header", i+1, len(writes))
			}
			for _, e := range unknown(got) {
				if !slices.Contains(known, e) {
					t.Fatalf("write %d of %d: extension %s came from nowhere", i+1, len(writes), e)
				}
			}
		})
		copy(state[w.Offset:], w.Data)
		got, err := format.DecodeHeader(state)
		if err != nil {
			t.Fatal(err)
		}
		switched = essence(got) == newEssence && oldEssence != newEssence
	}
	return state
}

// asQEMU encodes a header the way QEMU does: the feature names stand before the bitmaps and the unknown extensions.
func asQEMU(t testing.TB, h *format.Header) []byte {
	t.Helper()
	rank := func(e format.Extension) int {
		order := []uint32{format.ExtBackingFormat, format.ExtDataFile, format.ExtFullDisk, format.ExtFeatureNames, format.ExtBitmaps}
		if i := slices.Index(order, e.Type); i >= 0 {
			return i
		}
		return len(order)
	}
	exts := slices.Clone(h.Extensions)
	slices.SortStableFunc(exts, func(a, b format.Extension) int { return rank(a) - rank(b) })
	bare := *h
	bare.BackingFile, bare.Extensions = "", nil
	b := encode(t, &bare)
	length := 72
	if h.Version != 2 {
		length = int(binary.BigEndian.Uint32(b[100:]))
		if h.HeaderLength == 104 && len(h.UnknownFields) == 0 && h.CompressionType == 0 { // an older one
			length = 104
			binary.BigEndian.PutUint32(b[100:], 104)
		}
	}
	at := length
	for _, e := range exts {
		binary.BigEndian.PutUint32(b[at:], e.Type)
		binary.BigEndian.PutUint32(b[at+4:], uint32(len(e.Data)))
		at += 8 + copy(b[at+8:], e.Data)
		at = (at + 7) &^ 7
	}
	at += 8
	if h.BackingFile != "" {
		binary.BigEndian.PutUint64(b[8:], uint64(at))
		binary.BigEndian.PutUint32(b[16:], uint32(len(h.BackingFile)))
		copy(b[at:], h.BackingFile)
	}
	return b
}

// size returns the bytes that the header takes, with and without the feature names.
func size(h *format.Header) (all, lean int) {
	lean = 72 + 8
	if h.Version != 2 {
		lean = max(112, int(h.HeaderLength), 112+len(h.UnknownFields)) + 8
	}
	lean += len(h.BackingFile)
	all = lean
	for _, e := range h.Extensions {
		n := 8 + (len(e.Data)+7)&^7
		all += n
		if e.Type != format.ExtFeatureNames {
			lean += n
		}
	}
	return all, lean
}

// inFirstSector reports whether the essential extensions fit into the first sector.
func inFirstSector(h *format.Header) bool {
	x := *h
	x.BackingFile = ""
	x.Extensions = slices.DeleteFunc(slices.Clone(h.Extensions), func(e format.Extension) bool { return !slices.Contains(essential, e.Type) })
	_, n := size(&x)
	return n <= format.SectorSize
}

func TestRewriteOfEveryPair(t *testing.T) {
	name := func(n int) string { return strings.Repeat("abcdefghij", n/10+1)[:n] }
	bitmaps := format.BitmapsExtension{Count: 1, DirectorySize: 40, DirectoryOffset: 0x70000}.Encode()
	type variant struct {
		name   string
		change func(h *format.Header)
	}
	variants := []variant{
		{"plain", func(*format.Header) {}},
		{"bitmaps", func(h *format.Header) {
			h.SetExtension(format.ExtBitmaps, bitmaps)
			h.Autoclear = format.AutoclearBitmaps
		}},
		{"encrypted data file", func(h *format.Header) {
			h.CryptMethod = 2
			h.SetExtension(format.ExtFullDisk, binary.BigEndian.AppendUint64(make([]byte, 8), 4096))
			h.DataFile, h.Incompatible = true, format.IncompatDataFile
			h.SetExtension(format.ExtDataFile, []byte(name(80)))
		}},
		{"unknown", func(h *format.Header) {
			h.SetExtension(0x77777777, bytes.Repeat([]byte{7}, 100))
			h.SetExtension(0x66666666, bytes.Repeat([]byte{6}, 301))
			h.SetExtension(format.ExtBitmaps, bitmaps)
		}},
		{"no names", func(h *format.Header) {
			h.SetExtension(format.ExtFeatureNames, nil)
			h.Snapshots, h.SnapshotsOffset = 1, 0x40000
		}},
		{"long header", func(h *format.Header) { h.HeaderLength, h.UnknownFields = 160, bytes.Repeat([]byte{9}, 48) }},
		{"version 2", func(h *format.Header) { h.Version, h.HeaderLength = 2, 72; h.SetExtension(format.ExtFeatureNames, nil) }},
	}
	names := []string{"", name(1), name(30), "x" + name(29), name(200), name(500), "y" + name(1022)}
	sizes := []uint32{9, 10, 11, 12, 16}
	header := func(bits uint32, v variant, backing string) format.Header {
		h := format.Header{
			Geometry:              format.Geometry{ClusterBits: bits, RefcountOrder: 4},
			Version:               3,
			Size:                  1 << 20,
			L1Entries:             1 << 9,
			L1Offset:              0x30000,
			RefcountTableOffset:   0x10000,
			RefcountTableClusters: 1,
			HeaderLength:          112,
			Extensions:            []format.Extension{format.FeatureNames()},
		}
		if h.BackingFile = backing; backing != "" {
			h.SetExtension(format.ExtBackingFormat, []byte("qcow2"))
		}
		v.change(&h)
		return h
	}
	rng := rand.New(rand.NewPCG(1, 2))
	done, refused := 0, 0
	for _, bits := range sizes {
		for _, from := range variants {
			for _, to := range variants {
				for _, oldName := range names {
					for _, newName := range names {
						was, is := header(bits, from, oldName), header(bits, to, newName)
						if bits >= 16 && rng.IntN(4) > 0 && os.Getenv("QCOW_CSI_LONG") == "" {
							continue // as with clusters of 4 KiB
						}
						was.HeaderLength = []uint32{was.HeaderLength, 104}[rng.IntN(2)]
						all, lean := size(&was)
						if lean > 1<<bits {
							continue
						}
						if all > 1<<bits {
							was.SetExtension(format.ExtFeatureNames, nil)
						}
						cluster := asQEMU(t, &was)
						if rng.IntN(2) == 0 {
							var err error
							if cluster, err = was.Encode(); err != nil {
								t.Fatal(err)
							}
							cluster = append(cluster, make([]byte, 1<<bits-len(cluster))...)
						}
						if rewrite(t, cluster, &is, rng) != nil {
							done++
							continue
						}
						refused++
						// The old name can cut what is free in two, and the new one fits into neither half.
						if _, lean := size(&is); lean+len(oldName)+len(newName) <= 1<<bits {
							t.Errorf("%d bytes, %s with %d bytes of name to %s with %d: refused", 1<<bits, from.name, len(oldName), to.name, len(newName))
						}
					}
				}
			}
		}
	}
	t.Logf("%d rewrites, %d refused", done, refused)
	if done < 5000 || refused > done/4 {
		t.Errorf("only %d rewrites, %d refused", done, refused)
	}
}

// TestRewriteAgainAndAgain changes one cluster many times at random, as a long life does. Its first layout has the name at an odd place
// and garbage where nothing is in use.
func TestRewriteAgainAndAgain(t *testing.T) {
	seed, lives := seed.Of(t), 30
	if os.Getenv("QCOW_CSI_LONG") != "" {
		lives = 3000
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	text := func(n int) []byte {
		b := make([]byte, rng.IntN(n+1))
		for i := range b {
			b[i] = 'a' + byte(rng.IntN(26))
		}
		return b
	}
	done := 0
	for range lives {
		h := validHeader()
		h.ClusterBits = 9 + rng.Uint32N(8)
		h.L1Offset, h.RefcountTableOffset, h.SnapshotsOffset = 0x10000, 0x20000, 0x30000
		h.Size = min(h.Size, 1<<20)
		h.L1Entries = 1 << 9
		if h.ClusterBits < 11 {
			h.Extensions = h.Extensions[:1]
		}
		cluster := asQEMU(t, &h)
		if n := int(h.ClusterSize()); rng.IntN(2) == 0 && n > 1024 { // the name at the end of the cluster, garbage before it
			at := n - len(h.BackingFile)
			name, length := binary.BigEndian.Uint64(cluster[8:]), len(h.BackingFile)
			copy(cluster[at:], cluster[name:][:length])
			for i := int(name); i < at; i++ {
				cluster[i] = byte(rng.Uint32())
			}
			binary.BigEndian.PutUint64(cluster[8:], uint64(at))
		}
		for range 20 {
			h, err := format.DecodeHeader(cluster)
			if err != nil {
				t.Fatal(err)
			}
			for range 1 + rng.IntN(2) {
				switch rng.IntN(8) {
				case 0, 1:
					h.BackingFile = string(text([]int{20, 300, 1023}[rng.IntN(3)]))
				case 2:
					h.SetExtension(format.ExtBackingFormat, text(8))
				case 3:
					h.SetExtension(format.ExtBitmaps, [][]byte{nil, make([]byte, 24)}[rng.IntN(2)])
				case 4:
					h.SetExtension(0x11111111*(1+rng.Uint32N(5)), [][]byte{nil, text(50), text(400), text(9000)}[rng.IntN(4)])
				case 5:
					names := format.FeatureNames()
					h.SetExtension(format.ExtFeatureNames, [][]byte{nil, names.Data, names.Data[:96]}[rng.IntN(3)])
				case 6:
					h.SetExtension(format.ExtDataFile, [][]byte{nil, text(100), text(400)}[rng.IntN(3)])
				case 7:
					h.Size, h.Autoclear = h.Size^512, h.Autoclear^1
				}
			}
			if next := rewrite(t, cluster, h, rng); next != nil {
				cluster = next
				done++
			}
		}
	}
	if done < lives*10 {
		t.Errorf("only %d of %d rewrites", done, lives*20)
	}
}

func TestRewriteWritesLittle(t *testing.T) {
	h := validHeader()
	h.SetExtension(format.ExtBitmaps, format.BitmapsExtension{Count: 1, DirectorySize: 40, DirectoryOffset: 0x70000}.Encode())
	cluster := asQEMU(t, &h)
	for name, c := range map[string]struct {
		change func(h *format.Header)
		writes int
	}{
		"nothing":            {func(*format.Header) {}, 0},
		"a field":            {func(h *format.Header) { h.Autoclear = 0 }, 1},
		"the backing format": {func(h *format.Header) { h.SetExtension(format.ExtBackingFormat, []byte("raw")) }, 1},
		"the backing name":   {func(h *format.Header) { h.BackingFile = "other.qcow2" }, 2},
		"no backing name":    {func(h *format.Header) { h.BackingFile = ""; h.SetExtension(format.ExtBackingFormat, nil) }, 3},
		"the bitmaps":        {func(h *format.Header) { h.SetExtension(format.ExtBitmaps, make([]byte, 24)) }, 3},
	} {
		h, err := format.DecodeHeader(cluster)
		if err != nil {
			t.Fatal(err)
		}
		c.change(h)
		writes, err := h.Rewrite(cluster)
		if err != nil || len(writes) != c.writes {
			t.Errorf("%s: %d writes, want %d; %v", name, len(writes), c.writes, err)
		}
	}
}

func TestRewriteRefuses(t *testing.T) {
	h := validHeader()
	good := encode(t, &h)
	for name, c := range map[string]struct {
		change func(h *format.Header)
		old    []byte
		class  error
	}{
		"other clusters":      {func(h *format.Header) { h.ClusterBits = 12 }, good, format.ErrInvalid},
		"version 4":           {func(h *format.Header) { h.Version = 4 }, good, format.ErrInvalid},
		"features of 3 in 2":  {func(h *format.Header) { h.Version = 2 }, good, format.ErrInvalid},
		"name too long":       {func(h *format.Header) { h.BackingFile = strings.Repeat("x", 1024) }, good, format.ErrInvalid},
		"too much":            {func(h *format.Header) { h.SetExtension(5, make([]byte, 65536)) }, good, format.ErrInvalid},
		"essentials too long": {func(h *format.Header) { h.SetExtension(format.ExtDataFile, make([]byte, 600)) }, good, format.ErrInvalid},
		"header too long":     {func(h *format.Header) { h.HeaderLength = 1 << 17 }, good, format.ErrInvalid},
		"L1 misaligned":       {func(h *format.Header) { h.L1Offset++ }, good, format.ErrInvalid},
		"contradiction":       {func(h *format.Header) { h.CompressionType = 0 }, good, format.ErrInvalid},
		"odd header length":   {func(h *format.Header) { h.HeaderLength = 113 }, good, format.ErrInvalid},
		"not a header":        {func(*format.Header) {}, make([]byte, 65536), format.ErrCorrupt},
	} {
		h := validHeader()
		c.change(&h)
		if writes, err := h.Rewrite(c.old); !errors.Is(err, c.class) || writes != nil {
			t.Errorf("%s: %d writes, %v", name, len(writes), err)
		}
	}
}

func FuzzRewrite(f *testing.F) {
	h := validHeader()
	f.Add(encode(f, &h)[:1024], "base", []byte("raw"), []byte{1}, uint8(0))
	f.Add(asQEMU(f, &h)[:1024], strings.Repeat("n", 900), []byte{}, []byte{}, uint8(3))
	f.Add(encode(f, &h)[:1024], "", []byte{}, bytes.Repeat([]byte{2}, 200), uint8(7))
	f.Fuzz(func(t *testing.T, old []byte, name string, backingFormat, extension []byte, flags uint8) {
		h, err := format.DecodeHeader(old)
		if err != nil || h.ClusterBits > 16 {
			return
		}
		cluster := append(bytes.Clone(old), make([]byte, max(0, int(h.ClusterSize())-len(old)))...)[:h.ClusterSize()]
		if h, err = format.DecodeHeader(cluster); err != nil {
			return
		}
		h.BackingFile = name
		h.SetExtension(format.ExtBackingFormat, backingFormat)
		if flags&1 != 0 {
			h.SetExtension(0x01020304, extension)
		}
		if flags&2 != 0 {
			h.SetExtension(format.ExtBitmaps, make([]byte, 24))
		}
		if flags&4 != 0 {
			h.SetExtension(format.ExtFeatureNames, nil)
		}
		rewrite(t, cluster, h, rand.New(rand.NewPCG(3, 4)))
	})
}
