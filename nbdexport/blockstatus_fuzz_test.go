package nbdexport_test

import (
	"bytes"
	"context"
	"io"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// FuzzBlockStatus lets backends say anything about their bytes, and compares the replies with what follows from that
// byte by byte. Two bytes of says are an extent: its length less 1, and its flags.
func FuzzBlockStatus(f *testing.F) {
	sparingly(f)
	f.Add(uint8(0), false, uint16(0), uint16(100), []byte{99, 3, 99, 0})
	f.Add(uint8(4), true, uint16(1), uint16(30), []byte{3, 3, 30, 0, 3, 1, 15, 3, 16, 2})
	f.Add(uint8(9), false, uint16(0), uint16(2), bytes.Repeat([]byte{0, 1, 0, 0}, 700))
	f.Fuzz(func(t *testing.T, exponent uint8, one bool, first, number uint16, says []byte) {
		block := 1 << (exponent % 10)
		var extents []nbdexport.Extent
		var flags []uint64 // of each byte
		for ; len(says) >= 2 && len(flags) < 64<<10; says = says[2:] {
			e := nbdexport.Extent{Length: int64(says[0]) + 1, Flags: uint64(says[1] & 3)}
			extents = append(extents, e)
			flags = append(flags, slices.Repeat([]uint64{e.Flags}, int(e.Length))...)
		}
		if rest := len(flags) % block; rest != 0 {
			e := nbdexport.Extent{Length: int64(block - rest), Flags: 1}
			extents = append(extents, e)
			flags = append(flags, slices.Repeat([]uint64{1}, block-rest)...)
		}
		blocks := len(flags) / block
		if blocks == 0 {
			return
		}
		off := int(first) % blocks * block
		n := (1 + int(number)%(blocks-off/block)) * block
		names := []string{alloc, depth, dirty}
		b := &described{
			Backend: newMemory(int64(len(flags))), block: uint32(block),
			says: map[string][]nbdexport.Extent{alloc: extents, depth: extents, dirty: extents},
		}
		for _, style := range []nbdtest.Style{nbdtest.Structured, nbdtest.Extended} {
			r := nbdtest.Request{Command: nbdtest.CmdBlockStatus, Offset: uint64(off), Length: uint64(n)}
			if one {
				r.Flags = nbdtest.FlagReqOne
			}
			conn := &recorded{in: bytes.NewReader(append(opening(style, names...), r.EncodeIn(style)...))}
			server := newServer(t, nbdexport.Config{Exports: []nbdexport.Export{{Name: "disk", Backend: b}}})
			if err := server.ServeConn(context.Background(), conn); !isProtocolEnd(err) {
				t.Fatal(err)
			}
			// The reply is at the end, and its length is known.
			ledger := nbdtest.Ledger{Style: style, Contexts: []uint32{1, 2, 3}, Block: uint64(block)}
			ledger.Expect(r)
			magic := map[nbdtest.Style]uint32{nbdtest.Structured: nbdtest.StructuredReplyMagic, nbdtest.Extended: nbdtest.ExtendedReplyMagic}[style]
			_, rest, _ := bytes.Cut(conn.out.Bytes(), nbdtest.Message(magic))
			reply, err := ledger.Await(io.MultiReader(bytes.NewReader(nbdtest.Message(magic)), bytes.NewReader(rest)))
			if err != nil || reply.Err != nil {
				t.Fatal(err, reply)
			}
			for i, combine := range []func(a, b uint64) uint64{
				func(a, b uint64) uint64 { return a & b },
				func(a, b uint64) uint64 { return max(a, b) },
				func(a, b uint64) uint64 { return a | b },
			} {
				want := expected(flags[off:][:n], block, combine)
				if one {
					want = want[:1]
				}
				if got := reply.Status[i]; got.Context != uint32(i+1) || !slices.Equal(got.Extents, want) {
					t.Errorf("%v, %s, %d bytes at %d: %+v, want %+v", style, names[i], n, off, got, want)
				}
			}
		}
	})
}

// expected describes bytes by the flags that each of them has.
func expected(flags []uint64, block int, combine func(a, b uint64) uint64) (extents []nbdexport.Extent) {
	for b := range slices.Chunk(flags, block) {
		all := b[0]
		for _, f := range b[1:] {
			all = combine(all, f)
		}
		if last := len(extents) - 1; last >= 0 && extents[last].Flags == all {
			extents[last].Length += int64(block)
		} else {
			extents = append(extents, nbdexport.Extent{Length: int64(block), Flags: all})
		}
	}
	return extents
}
