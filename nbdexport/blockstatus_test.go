package nbdexport_test

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// described is a backend whose metadata contexts say what the test wants, from the start of the export on.
type described struct {
	nbdexport.Backend
	block  uint32
	says   map[string][]nbdexport.Extent
	failAt map[string]int64 // the offset from which on a context can't be told
}

func (d *described) Info() nbdexport.Info {
	info := d.Backend.Info()
	info.MinimumBlock, info.Contexts = d.block, slices.Sorted(maps.Keys(d.says))
	return info
}

func (d *described) Extents(context string, off, n int64) iter.Seq2[nbdexport.Extent, error] {
	return func(yield func(nbdexport.Extent, error) bool) {
		at := int64(0)
		for _, e := range d.says[context] {
			start, end := max(at, off), min(at+e.Length, off+n)
			if at += e.Length; start >= end {
				continue
			}
			if fail, ok := d.failAt[context]; ok && end > fail {
				yield(nbdexport.Extent{}, syscall.EIO)
				return
			}
			if !yield(nbdexport.Extent{Length: end - start, Flags: e.Flags}, nil) {
				return
			}
		}
	}
}

const (
	alloc = nbdexport.ContextAllocation
	depth = nbdexport.ContextAllocationDepth
	dirty = nbdexport.ContextDirtyBitmap + "b"
)

// forEachChunkedStyle runs a test in each of the styles that have chunks.
func forEachChunkedStyle(t *testing.T, test func(*testing.T, nbdtest.Style)) {
	t.Helper()
	forEachStyle(t, func(t *testing.T, s nbdtest.Style) {
		if s != nbdtest.Simple {
			test(t, s)
		}
	})
}

func TestBlockStatus(t *testing.T) {
	type extents = []nbdexport.Extent
	const size = 64 << 10
	for name, test := range map[string]struct {
		block    uint32
		says     map[string]extents
		failAt   map[string]int64
		flags    uint16
		off, n   uint64
		want     map[string]extents
		err      syscall.Errno
		contexts []string // to be selected
	}{
		"one context": {
			says: map[string]extents{alloc: {{4096, 0}, {60 << 10, 3}}}, contexts: []string{alloc}, n: size,
			want: map[string]extents{alloc: {{4096, 0}, {60 << 10, 3}}},
		},
		"the end of one": {
			says: map[string]extents{alloc: {{4096, 0}, {60 << 10, 3}}}, contexts: []string{alloc}, off: 4000, n: 200,
			want: map[string]extents{alloc: {{96, 0}, {104, 3}}},
		},
		"neighbours that are alike": {
			says: map[string]extents{alloc: {{512, 3}, {512, 3}, {512, 0}, {512, 0}, {62 << 10, 3}}}, contexts: []string{alloc}, n: 4096,
			want: map[string]extents{alloc: {{1024, 3}, {1024, 0}, {2048, 3}}},
		},
		"only one": {
			says: map[string]extents{alloc: {{512, 3}, {512, 3}, {512, 0}, {62<<10 + 512, 3}}}, contexts: []string{alloc},
			flags: nbdtest.FlagReqOne, n: size,
			want: map[string]extents{alloc: {{1024, 3}}},
		},
		"only one, which is all": {
			says: map[string]extents{alloc: {{size, 3}}}, contexts: []string{alloc}, flags: nbdtest.FlagReqOne, off: 512, n: 1024,
			want: map[string]extents{alloc: {{1024, 3}}},
		},
		"several contexts": {
			says: map[string]extents{alloc: {{size, 0}}, depth: {{4096, 2}, {60 << 10, 1}}, dirty: {{8192, 1}, {56 << 10, 0}}},
			n:    size, contexts: []string{dirty, alloc, depth},
			want: map[string]extents{alloc: {{size, 0}}, depth: {{4096, 2}, {60 << 10, 1}}, dirty: {{8192, 1}, {56 << 10, 0}}},
		},
		"some of several": {
			says: map[string]extents{alloc: {{size, 0}}, depth: {{4096, 2}, {60 << 10, 1}}, dirty: {{8192, 1}, {56 << 10, 0}}},
			n:    size, contexts: []string{dirty, depth},
			want: map[string]extents{depth: {{4096, 2}, {60 << 10, 1}}, dirty: {{8192, 1}, {56 << 10, 0}}},
		},
		"parts of blocks": { // a hole only if all of it is, as deep as its deepest part, dirty if any of it is
			block: 4096, says: map[string]extents{
				alloc: {{5000, 3}, {1000, 2}, {2192, 3}, {1, 0}, {4095, 3}, {52 << 10, 3}},
				depth: {{4097, 1}, {4095, 3}, {56 << 10, 0}},
				dirty: {{4095, 0}, {1, 1}, {4096, 0}, {1, 1}, {56<<10 - 1, 0}},
			}, contexts: []string{alloc, depth, dirty}, n: size,
			want: map[string]extents{
				alloc: {{4096, 3}, {4096, 2}, {4096, 0}, {52 << 10, 3}},
				depth: {{4096, 1}, {4096, 3}, {56 << 10, 0}},
				dirty: {{4096, 1}, {4096, 0}, {4096, 1}, {52 << 10, 0}},
			},
		},
		"only one of parts": {
			block: 4096, says: map[string]extents{alloc: {{100, 3}, {100, 0}, {8192 - 200, 3}, {56 << 10, 0}}},
			contexts: []string{alloc}, flags: nbdtest.FlagReqOne, n: size,
			want: map[string]extents{alloc: {{4096, 0}}},
		},
		"an error behind": {
			says: map[string]extents{alloc: {{4096, 0}, {60 << 10, 3}}}, failAt: map[string]int64{alloc: 8192}, contexts: []string{alloc}, n: size,
			want: map[string]extents{alloc: {{4096, 0}}},
		},
		"an error": {
			says: map[string]extents{alloc: {{size, 0}}}, failAt: map[string]int64{alloc: 0}, contexts: []string{alloc}, n: size, err: syscall.EIO,
		},
		"an error of the second": {
			says: map[string]extents{alloc: {{size, 0}}, dirty: {{size, 0}}}, failAt: map[string]int64{dirty: 0},
			contexts: []string{alloc, dirty}, n: size, err: syscall.EIO,
		},
		"an error in the first block": {
			block: 4096, says: map[string]extents{alloc: {{512, 0}, {size - 512, 3}}}, failAt: map[string]int64{alloc: 4096},
			contexts: []string{alloc}, n: size, err: syscall.EIO,
		},
		"nothing":             {says: map[string]extents{alloc: {{size, 0}}}, contexts: []string{alloc}, err: syscall.EINVAL},
		"past the end":        {says: map[string]extents{alloc: {{size, 0}}}, contexts: []string{alloc}, off: 512, n: size, err: syscall.EINVAL},
		"unaligned":           {block: 512, says: map[string]extents{alloc: {{size, 0}}}, contexts: []string{alloc}, n: 100, err: syscall.EINVAL},
		"unaligned offset":    {block: 512, says: map[string]extents{alloc: {{size, 0}}}, contexts: []string{alloc}, off: 1, n: 512, err: syscall.EINVAL},
		"no context":          {says: map[string]extents{alloc: {{size, 0}}}, n: size, err: syscall.EINVAL},
		"a backend's silence": {says: map[string]extents{alloc: nil}, contexts: []string{alloc}, n: size, err: syscall.EIO},
		"a wrong flag":        {says: map[string]extents{alloc: {{size, 0}}}, contexts: []string{alloc}, flags: nbdtest.FlagDF, n: size, err: syscall.EINVAL},
	} {
		t.Run(name, func(t *testing.T) {
			forEachChunkedStyle(t, func(t *testing.T, style nbdtest.Style) {
				client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", offer(&described{newMemory(size), test.block, test.says, test.failAt})))
				client.Greet(3)
				client.Agree(style)
				ids, _ := client.SetContexts("", test.contexts...)
				client.Choose("")
				reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdBlockStatus, Flags: test.flags, Offset: test.off, Length: test.n})
				if reply.Errno() != test.err {
					t.Fatalf("%v, want %v", reply.Err, test.err)
				}
				if got := byName(reply, ids); test.err == 0 && fmt.Sprint(got) != fmt.Sprint(test.want) {
					t.Errorf("got %v, want %v", got, test.want)
				}
				if _, err := client.ReadBytes(0, 4096); err != nil {
					t.Errorf("read afterwards: %v", err)
				}
				client.Disconnect()
			})
		})
	}
}

// byName is what a reply says, by the names of the contexts.
func byName(reply *nbdtest.Reply, ids map[string]uint32) map[string][]nbdexport.Extent {
	got := make(map[string][]nbdexport.Extent)
	for name, id := range ids {
		for _, s := range reply.Status {
			if s.Context == id {
				got[name] = s.Extents
			}
		}
	}
	return got
}

// TestBlockStatusLimit has more extents than one reply may hold, and asks until all are told.
func TestBlockStatusLimit(t *testing.T) {
	const number, length = 40_000, 512
	says := make([]nbdexport.Extent, number)
	for i := range says {
		says[i] = nbdexport.Extent{Length: length, Flags: uint64(i % 2)}
	}
	b := &described{Backend: &hollow{info: nbdexport.Info{Size: number * length}}, says: map[string][]nbdexport.Extent{dirty: says}}
	forEachChunkedStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectIn(t, style, b, dirty)
		var got []nbdexport.Extent
		replies := 0
		for off := uint64(0); off < number*length; replies++ {
			reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdBlockStatus, Offset: off, Length: number*length - off})
			if reply.Err != nil || len(reply.Status[0].Extents) > 1<<20 {
				t.Fatalf("%v, %d extents", reply.Err, len(reply.Status))
			}
			for _, e := range reply.Status[0].Extents {
				off += uint64(e.Length)
			}
			got = append(got, reply.Status[0].Extents...)
		}
		if !slices.Equal(got, says) || replies < 2 {
			t.Errorf("%d extents in %d replies", len(got), replies)
		}
	})
}

// TestBlockStatusPayload asks for some of the contexts that were selected.
func TestBlockStatusPayload(t *testing.T) {
	const size = 64 << 10
	says := map[string][]nbdexport.Extent{alloc: {{size, 0}}, depth: {{size, 1}}, dirty: {{512, 1}, {size - 512, 0}}}
	client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", offer(&described{newMemory(size), 512, says, nil})))
	client.Greet(3)
	client.Agree(nbdtest.Extended)
	if e, _ := client.Info(nbdtest.OptInfo, ""); e.Flags&nbdexport.FlagBlockStatusPayload != 0 {
		t.Errorf("flags without contexts: %#x", e.Flags)
	}
	ids, _ := client.SetContexts("", alloc, depth, dirty)
	if e := client.Choose(""); e.Flags&nbdexport.FlagBlockStatusPayload == 0 {
		t.Errorf("flags: %#x", e.Flags)
	}
	payload := func(n uint64, names ...string) []byte {
		b := nbdtest.Message(n)
		for _, name := range names {
			b = append(b, nbdtest.Message(ids[name])...)
		}
		return b
	}
	for name, test := range map[string]struct {
		off     uint64
		flags   uint16
		payload []byte
		want    []string
		err     syscall.Errno
	}{
		"one":                {payload: payload(size, dirty), want: []string{dirty}},
		"one, first extent":  {payload: payload(size, dirty), flags: nbdtest.FlagReqOne, want: []string{dirty}},
		"two":                {payload: payload(size-512, dirty, alloc), off: 512, want: []string{alloc, dirty}},
		"all":                {payload: payload(512, alloc, depth, dirty), want: []string{alloc, depth, dirty}},
		"twice the same":     {payload: payload(size, dirty, alloc, dirty), err: syscall.EINVAL},
		"unknown":            {payload: nbdtest.Message(uint64(size), uint32(1<<32-1)), err: syscall.EINVAL},
		"known and unknown":  {payload: append(payload(size, alloc), 0, 0, 0, 0), err: syscall.EINVAL},
		"none":               {payload: payload(size), err: syscall.EINVAL},
		"less than a length": {payload: make([]byte, 7), err: syscall.EINVAL},
		"no payload at all":  {err: syscall.EINVAL},
		"part of an id":      {payload: append(payload(size, alloc), 0, 0), err: syscall.EINVAL},
		"of no bytes":        {payload: payload(0, alloc), err: syscall.EINVAL},
		"past the end":       {payload: payload(size, alloc), off: 512, err: syscall.EINVAL},
		"of 2^64":            {payload: payload(1<<64-512, alloc), off: 512, err: syscall.EINVAL},
		"at 2^64":            {payload: payload(512, alloc), off: 1<<64 - 512, err: syscall.EINVAL},
		"unaligned":          {payload: payload(100, alloc), err: syscall.EINVAL},
		"unaligned offset":   {payload: payload(512, alloc), off: 100, err: syscall.EINVAL},
		"a million ids":      {payload: append(payload(size, alloc), make([]byte, 4<<20)...), err: syscall.EINVAL},
	} {
		reply := client.Exchange(nbdtest.Request{
			Command: nbdtest.CmdBlockStatus, Flags: test.flags | nbdtest.FlagPayloadLen, Offset: test.off,
			Length: uint64(len(test.payload)), Payload: test.payload,
		})
		if reply.Errno() != test.err {
			t.Errorf("%s: %v, want %v", name, reply.Err, test.err)
		}
		if got := slices.Sorted(maps.Keys(byName(reply, ids))); test.err == 0 && !slices.Equal(got, test.want) {
			t.Errorf("%s: contexts %q, want %q", name, got, test.want)
		}
	}
	client.Disconnect()
}

// TestBlockStatusOfMoreThanAsked has requests about as much as 32 bits can count, and backends that know more than they were
// asked: no length in a reply may be cut to its lower 32 bits, or go past the request.
func TestBlockStatusOfMoreThanAsked(t *testing.T) {
	for name, length := range map[string]int64{"what was asked": 0, "4 GiB": 1 << 32, "4 GiB and a block": 1<<32 + 512, "everything": 1<<63 - 512} {
		t.Run(name, func(t *testing.T) {
			forEachChunkedStyle(t, func(t *testing.T, style nbdtest.Style) {
				b := &generous{hollow{info: nbdexport.Info{Size: 1 << 62, MinimumBlock: 512, Contexts: []string{alloc}}}, length}
				client := connectIn(t, style, b, alloc)
				for _, n := range []uint64{512, 1<<32 - 512, 1 << 31} {
					for _, flags := range []uint16{0, nbdtest.FlagReqOne} {
						reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdBlockStatus, Flags: flags, Offset: 512, Length: n})
						if want := []nbdexport.Extent{{Length: int64(n), Flags: 3}}; reply.Err != nil || !slices.Equal(reply.Status[0].Extents, want) {
							t.Errorf("%d bytes: %+v", n, reply)
						}
					}
				}
			})
		})
	}
}

// generous is a backend that describes so many bytes, whatever it is asked for.
type generous struct {
	hollow
	length int64
}

func (g *generous) Extents(context string, off, n int64) iter.Seq2[nbdexport.Extent, error] {
	return g.hollow.Extents(context, off, max(n, g.length))
}
