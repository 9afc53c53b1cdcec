package nbdexport_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// TestHoles reads data and holes in every order. In a picture a letter is a sector of data and a dot one of a hole.
func TestHoles(t *testing.T) {
	const sector = 512
	data := func(off, n uint64) nbdtest.Chunk {
		return nbdtest.Chunk{Type: nbdtest.ChunkData, Offset: off, Length: n}
	}
	hole := func(off, n uint64) nbdtest.Chunk {
		return nbdtest.Chunk{Type: nbdtest.ChunkHole, Offset: off, Length: n}
	}
	for name, test := range map[string]struct {
		picture string
		off, n  uint64
		want    []nbdtest.Chunk
	}{
		"one hole":                   {"....", 0, 2048, []nbdtest.Chunk{hole(0, 2048)}},
		"one sector of a hole":       {"....", 512, 512, []nbdtest.Chunk{hole(512, 512)}},
		"less than a sector":         {"....", 512, 511, []nbdtest.Chunk{data(512, 511)}},
		"a byte of a hole":           {".", 100, 1, []nbdtest.Chunk{data(100, 1)}},
		"all data":                   {"abcd", 0, 2048, []nbdtest.Chunk{data(0, 2048)}},
		"hole at the start":          {"..cd", 0, 2048, []nbdtest.Chunk{hole(0, 1024), data(1024, 1024)}},
		"hole at the end":            {"ab..", 0, 2048, []nbdtest.Chunk{data(0, 1024), hole(1024, 1024)}},
		"hole between":               {"a..d", 0, 2048, []nbdtest.Chunk{data(0, 512), hole(512, 1024), data(1536, 512)}},
		"data between":               {".bc.", 0, 2048, []nbdtest.Chunk{hole(0, 512), data(512, 1024), hole(1536, 512)}},
		"alternating, hole first":    {".b.d", 0, 2048, []nbdtest.Chunk{hole(0, 512), data(512, 512), hole(1024, 512), data(1536, 512)}},
		"alternating, data first":    {"a.c.", 0, 2048, []nbdtest.Chunk{data(0, 512), hole(512, 512), data(1024, 512), hole(1536, 512)}},
		"end of a hole":              {".b", 300, 512, []nbdtest.Chunk{data(300, 512)}},
		"start of a hole":            {"a.", 300, 512, []nbdtest.Chunk{data(300, 512)}},
		"short ends of holes":        {".b.", 300, 800, []nbdtest.Chunk{data(300, 800)}},
		"a byte of data and a hole":  {"a.", 511, 513, []nbdtest.Chunk{data(511, 1), hole(512, 512)}},
		"a hole and a byte of data":  {".b", 0, 513, []nbdtest.Chunk{hole(0, 512), data(512, 1)}},
		"short hole, data, and hole": {".b..", 511, 1537, []nbdtest.Chunk{data(511, 513), hole(1024, 1024)}},
	} {
		for _, style := range nbdtest.Styles {
			t.Run(fmt.Sprintf("%s/%v", name, style), func(t *testing.T) {
				b := newMemory(int64(len(test.picture)) * sector)
				for i, c := range []byte(test.picture) {
					if c != '.' {
						if _, err := b.WriteAt(bytes.Repeat([]byte{c}, sector), int64(i)*sector); err != nil {
							t.Fatal(err)
						}
					}
				}
				client := connectIn(t, style, b)
				want := b.Bytes()[test.off:][:test.n]
				whole := test.want
				if style == nbdtest.Simple {
					whole = nil
				}
				reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdRead, Offset: test.off, Length: test.n})
				if !slices.Equal(reply.Chunks, whole) || !bytes.Equal(reply.Data, want) || reply.Err != nil {
					t.Errorf("%v, data as expected: %t, chunks %+v, want %+v", reply.Err, bytes.Equal(reply.Data, want), reply.Chunks, whole)
				}
				if style == nbdtest.Simple {
					return
				}
				r := nbdtest.Request{Command: nbdtest.CmdRead, Flags: nbdtest.FlagDF, Offset: test.off, Length: test.n}
				if reply := client.Exchange(r); !slices.Equal(reply.Chunks, []nbdtest.Chunk{data(test.off, test.n)}) || !bytes.Equal(reply.Data, want) {
					t.Errorf("unfragmented: chunks %+v", reply.Chunks)
				}
			})
		}
	}
}

// TestHolesAtRandom reads at random places of random data and holes, small reads and ones for workers.
func TestHolesAtRandom(t *testing.T) {
	const size = 4 * mib
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	b := newMemory(size)
	for range 1500 {
		p := bytes.Repeat([]byte{byte(rng.Uint32() | 1)}, 512*(1+rng.IntN(4)))
		if _, err := b.WriteAt(p, 512*int64(rng.IntN(size/512-4))); err != nil {
			t.Fatal(err)
		}
	}
	contents := b.Bytes()
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectIn(t, style, b)
		for range 200 {
			n := 1 + rng.IntN(1<<(1+rng.IntN(21)))
			off := rng.IntN(size - n + 1)
			if got, err := client.ReadBytes(uint64(off), n); err != nil || !bytes.Equal(got, contents[off:][:n]) {
				t.Fatalf("%d bytes at %d: %v, or other data", n, off, err)
			}
		}
		client.Disconnect()
	})
}

// TestReadFailsBehindHoles has a read that fails at its last sector: the error is all there is in the reply.
func TestReadFailsBehindHoles(t *testing.T) {
	for _, n := range []uint64{4096, 64 << 10, 256 << 10} {
		b := newMemory(mib)
		for off := int64(0); off < mib; off += 1024 {
			if _, err := b.WriteAt([]byte("data"), off); err != nil {
				t.Fatal(err)
			}
		}
		b.Before = func(op nbdtest.Operation) error {
			if op.Kind == nbdtest.Read && op.Offset+op.Length == int64(n) && op.Length <= 512 {
				return syscall.EIO
			}
			return nil
		}
		for _, style := range []nbdtest.Style{nbdtest.Structured, nbdtest.Extended} {
			client := connectIn(t, style, b)
			reply := client.Exchange(nbdtest.Request{Command: nbdtest.CmdRead, Length: n})
			if !errors.Is(reply.Err, syscall.EIO) || len(reply.Chunks) != 1 || reply.Chunks[0].Text == "" {
				t.Errorf("%v, %d bytes: %v, chunks %+v", style, n, reply.Err, reply.Chunks)
			}
			if _, err := client.ReadBytes(0, 2048); err != nil {
				t.Errorf("read afterwards: %v", err)
			}
		}
	}
}

// TestStuckBackend has a backend that breaks its promise and reads nothing, without an error.
func TestStuckBackend(t *testing.T) {
	forEachStyle(t, func(t *testing.T, style nbdtest.Style) {
		client := connectIn(t, style, stuck{newMemory(mib)})
		for _, r := range []nbdtest.Request{
			{Command: nbdtest.CmdRead, Length: 512},
			{Command: nbdtest.CmdRead, Length: 256 << 10},
			{Command: nbdtest.CmdCache, Length: 512},
		} {
			if _, err := client.Do(r); !errors.Is(err, syscall.EIO) {
				t.Errorf("command %d, %d bytes: %v, want EIO", r.Command, r.Length, err)
			}
		}
	})
}

type stuck struct{ nbdexport.Backend }

func (stuck) ReadAt([]byte, int64) (int, error)           { return 0, nil }
func (stuck) ReadExtent([]byte, int64) (int, bool, error) { return 0, false, nil }
