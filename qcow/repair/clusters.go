package repair

import (
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// use says what a host cluster is used for.
type use uint8

const (
	unused    use = iota
	fixed         // the header, the encryption header: they cannot move
	refcounts     // the refcount table that the header names, and its blocks: they are replaced
	table         // an L1 table, the snapshot table
	l2            // an L2 table
	bitmap        // whatever belongs to persistent bitmaps
	data          // guest clusters, compressed ones included
)

const (
	maxPageBits = 10 // log2 of the clusters of a page

	// A word is the use of a cluster in the upper four bits, whether the header of before reaches it, and
	// the number of references to it in what is being made.
	useShift      = 28
	reached       = 1 << 27
	maxReferences = reached - 1
)

// word is what is known of a cluster. It may be given away when it is 0: unused, not reached, no references.
type word uint32

func newWord(u use, n uint64) word { return word(u)<<useShift | word(n) }
func (w word) use() use            { return use(w >> useShift) }
func (w word) count() uint64       { return uint64(w & maxReferences) }

// page holds what is known of 1<<pageBits consecutive host clusters. A page never spans two refcount blocks.
type page struct {
	stored []byte // their refcounts, as the refcount block of before has them
	words  []word
}

// clusterMap knows the clusters that something refers to, in pages, so that an image which only claims to be large costs
// little.
type clusterMap struct {
	format.Geometry
	pageBits uint32
	pages    map[uint64]*page // by page number
	last     *page            // the page that was used last, and its number
	lastNum  uint64
	read     func(stored []byte, cl uint64) error // reads the refcounts of the clusters from cl on
	memory   *budget
}

func newClusterMap(g format.Geometry, memory *budget, read func([]byte, uint64) error) clusterMap {
	return clusterMap{Geometry: g, pageBits: min(maxPageBits, g.BlockBits()), pages: make(map[uint64]*page), read: read, memory: memory}
}

// perPage returns the clusters of a page.
func (m *clusterMap) perPage() uint64 { return 1 << m.pageBits }

// storedBytes returns the bytes that the refcounts of a page take.
func (m *clusterMap) storedBytes() uint64 { return m.perPage() << m.RefcountOrder / 8 }

// at returns the word of cluster cl, and its refcount as stored.
func (m *clusterMap) at(cl uint64) (w *word, stored uint64, err error) {
	num, i := cl>>m.pageBits, cl&(m.perPage()-1)
	p := m.last
	if p == nil || num != m.lastNum {
		if p = m.pages[num]; p == nil {
			if err := m.memory.take(int64(m.perPage()*4 + m.storedBytes() + pageOverhead)); err != nil {
				return nil, 0, err
			}
			p = &page{stored: make([]byte, m.storedBytes()), words: make([]word, m.perPage())}
			if err := m.read(p.stored, num<<m.pageBits); err != nil {
				return nil, 0, err
			}
			m.pages[num] = p
		}
		m.last, m.lastNum = p, num
	}
	return &p.words[i], format.Refcount(p.stored, m.RefcountOrder, i), nil
}

// pageOverhead is what a page costs besides its content: headers and its place in the map.
const pageOverhead = 128

// word returns what is known of cluster cl.
func (m *clusterMap) word(cl uint64) word {
	num := cl >> m.pageBits
	p := m.last
	if p == nil || num != m.lastNum {
		if p = m.pages[num]; p == nil {
			return 0
		}
		m.last, m.lastNum = p, num
	}
	return p.words[cl&(m.perPage()-1)]
}

// set changes what is known of cluster cl.
func (m *clusterMap) set(cl uint64, w word) error {
	p, _, err := m.at(cl)
	if err == nil {
		*p = w
	}
	return err
}

// reach notes that the header of before reaches cluster cl: it must not be overwritten.
func (m *clusterMap) reach(cl uint64) error {
	w, _, err := m.at(cl)
	if err == nil {
		*w |= reached
	}
	return err
}

// numbers returns the page numbers in ascending order.
func (m *clusterMap) numbers() []uint64 {
	nums := make([]uint64, 0, len(m.pages))
	for n := range m.pages {
		nums = append(nums, n)
	}
	slices.Sort(nums)
	return nums
}

// end returns the cluster behind the last one with a reference.
func (m *clusterMap) end() uint64 {
	nums := m.numbers()
	for _, num := range slices.Backward(nums) {
		for i, w := range slices.Backward(m.pages[num].words) {
			if w.count() > 0 {
				return num<<m.pageBits + uint64(i) + 1
			}
		}
	}
	return 0
}

// budget bounds memory.
type budget struct{ left, total int64 }

func (b *budget) take(n int64) error {
	if b.left -= n; b.left < 0 {
		return fmt.Errorf("the repair needs more than %d bytes of memory", b.total)
	}
	return nil
}
