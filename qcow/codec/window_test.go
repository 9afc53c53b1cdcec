package codec_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
)

// farthest inflates a stream, symbol by symbol as RFC 1951 has it, and returns its content and its farthest reference.
func farthest(src []byte) (content []byte, distance int, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("not a deflate stream: %v", r)
		}
	}()
	pos := 0
	bits := func(n int) (v int) {
		for i := range n {
			v |= int(src[pos/8]>>(pos%8)&1) << i
			pos++
		}
		return v
	}
	for last := false; !last; {
		last = bits(1) == 1
		switch bits(2) {
		case 0:
			pos = (pos + 7) / 8 * 8
			n := bits(16)
			bits(16)
			content = append(content, src[pos/8:][:n]...)
			pos += 8 * n
		case 1:
			lengths := slices.Concat(slices.Repeat([]int{8}, 144), slices.Repeat([]int{9}, 112), slices.Repeat([]int{7}, 24), slices.Repeat([]int{8}, 8))
			content, distance = symbols(content, distance, bits, newCode(lengths), newCode(slices.Repeat([]int{5}, 30)))
		case 2:
			literals, distances, n := 257+bits(5), 1+bits(5), 4+bits(4)
			lengths := make([]int, 19)
			for _, i := range []int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}[:n] {
				lengths[i] = bits(3)
			}
			code := newCode(lengths)
			var all []int
			for len(all) < literals+distances {
				switch s := code.next(bits); s {
				case 16:
					all = append(all, slices.Repeat(all[len(all)-1:], 3+bits(2))...)
				case 17:
					all = append(all, make([]int, 3+bits(3))...)
				case 18:
					all = append(all, make([]int, 11+bits(7))...)
				default:
					all = append(all, s)
				}
			}
			content, distance = symbols(content, distance, bits, newCode(all[:literals]), newCode(all[literals:]))
		default:
			return nil, 0, errors.New("reserved block")
		}
	}
	return content, distance, nil
}

// symbols reads the symbols of a block.
func symbols(content []byte, farthest int, bits func(int) int, literals, distances prefixCode) ([]byte, int) {
	for {
		s := literals.next(bits)
		if s < 256 {
			content = append(content, byte(s))
			continue
		}
		if s == 256 {
			return content, farthest
		}
		length := 258
		if s < 285 {
			length = base(s-257, 4) + 3 + bits(extra(s-257, 4))
		}
		d := distances.next(bits)
		distance := base(d, 2) + 1 + bits(extra(d, 2))
		farthest = max(farthest, distance)
		for range length {
			content = append(content, content[len(content)-distance])
		}
	}
}

// Lengths and distances come in groups of per codes, each group with one more extra bit than the one before; the first two have none.
func extra(code, per int) int { return max(0, code/per-1) }

func base(code, per int) (n int) {
	for i := range code {
		n += 1 << extra(i, per)
	}
	return n
}

// prefixCode maps code words, as their length and value, to symbols.
type prefixCode map[[2]int]int

func newCode(lengths []int) prefixCode {
	c, value := prefixCode{}, 0
	for n := 1; n <= 15; n++ {
		for s, l := range lengths {
			if l == n {
				c[[2]int{n, value}] = s
				value++
			}
		}
		value <<= 1
	}
	return c
}

func (c prefixCode) next(bits func(int) int) int {
	value := 0
	for n := 1; n <= 15; n++ {
		value = value<<1 | bits(1)
		if s, ok := c[[2]int{n, value}]; ok {
			return s
		}
	}
	panic("no such code word")
}

// Nothing made here refers back farther than the window of QEMU's streams, however far it would have to look for a match.
func TestDeflateWindow(t *testing.T) {
	const seed, window = 7, 4096
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	most := 0
	for _, n := range []int{512, 4096, 64 << 10, 1 << 20} {
		clusters := samples(n, rng)
		for _, period := range []int{100, 4000, 4090, 4096, 4097, 4200, 6000, 40_000} {
			if period < n {
				clusters[fmt.Sprint("period ", period)] = bytes.Repeat(clusters["random"][:period], n/period+1)[:n]
			}
		}
		words := make([]byte, 0, n) // pieces of the past, from anywhere in it
		for words = append(words, clusters["random"][:n/8]...); len(words) < n; {
			from, length := rng.IntN(len(words)), 3+rng.IntN(60)
			words = append(words, words[from:min(from+length, len(words))]...)
		}
		clusters["words"] = words[:n]
		for name, cluster := range clusters {
			out, ok, err := codec.Compress(codec.Deflate, nil, cluster)
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				continue
			}
			content, distance, err := farthest(out)
			if err != nil || !bytes.Equal(content, cluster) {
				t.Fatalf("%s of %d bytes: wrong content, %v", name, n, err)
			}
			if distance > window {
				t.Errorf("%s of %d bytes: a reference over %d bytes", name, n, distance)
			}
			most = max(most, distance)
		}
	}
	if most < window/2 {
		t.Errorf("the farthest reference is over %d bytes: the window is not used", most)
	}
	if _, distance, err := farthest(flateOf(t, bytes.Repeat(samples(6000, rng)["random"], 3))); err != nil || distance != 6000 {
		t.Errorf("of a stream with a larger window: %d, %v", distance, err)
	}
}
