package interop_test

import (
	"errors"
	"fmt"
	"slices"
)

// firstRequests returns what makes the clusters of an image as its combination says: compressed ones first, since QEMU compresses only what
// nothing was written to.
func (s *subject) firstRequests() []request {
	c := s.c
	var list []request
	if s.unknownAtFirst() {
		list = append(list, request{deed: plainWrite, n: int64(len(s.disk)), ink: inks()[0]})
	}
	if c.is(byCompression, "zlib") || c.is(byCompression, "zstd") {
		n := 3
		if s.version == 2 && s.backing != nil { // what is compressed can't be discarded to be compressed again
			n = 1
		}
		list = append(list, s.requests(n, compressedWrite)...)
	}
	end := int64(len(s.disk))
	rest := append(s.requests(5, plainWrite), request{deed: plainWrite, off: end - 512, n: 512, ink: inks()[2]}) // the last cluster too
	if kind, ok := map[string]deed{"kept": zeroKept, "unmapped": zeroUnmapped}[c.value(byZeroes)]; ok {
		rest = append(rest, s.requests(3, kind)...)
	}
	if c.is(byDiscard, "yes") {
		rest = append(rest, s.requests(2, discard)...)
	}
	s.rng.Shuffle(len(rest), func(i, k int) { rest[i], rest[k] = rest[k], rest[i] })
	return append(list, rest...)
}

// unknownAtFirst says whether clusters that nobody has written to read as anything: those that QEMU allocates in an encrypted image.
func (s *subject) unknownAtFirst() bool {
	return s.encrypted() && (!s.c.is(byPreallocation, "off") || s.c.is(byData, "raw"))
}

// anyRequests returns requests of every kind that does not compress.
func (s *subject) anyRequests(n int) []request {
	return s.requests(n, plainWrite, plainWrite, plainWrite, zeroKept, zeroUnmapped, discard)
}

// steps does one thing after the other, until one fails.
func steps(list ...func() error) error {
	for _, step := range list {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// make has the first author make the image, as its combination says.
func (s *subject) make() (err error) {
	by := s.b.first(s)
	defer func() { err = errors.Join(err, by.done()) }()
	return steps(
		by.create,
		func() error { return s.send(by, s.firstRequests()) },
		func() error { return s.addBitmaps(by) },
		func() error { return s.takeSnapshots(by) },
		func() error { return s.whole(by, s.c.value(byChange)) },
		func() error { return s.send(by, s.anyRequests(5)) },
	)
}

// addBitmaps adds one bitmap, or one that records, one that does not, and one whose bits are smaller than most clusters.
func (s *subject) addBitmaps(by author) error {
	all := []dirty{{name: "b64k", granularity: 64 << 10}, {name: "asleep", granularity: 4096, disabled: true}, {name: "b512", granularity: 512}}
	for i := range all[:s.c.number(byBitmaps)] {
		if err := s.addBitmap(by, &all[i]); err != nil {
			return err
		}
	}
	return nil
}

// takeSnapshots takes the snapshots, with different content, and where the version allows it of different sizes.
func (s *subject) takeSnapshots(by author) error {
	for i := range s.c.number(bySnapshots) {
		if i > 0 && s.version == 3 {
			if err := s.whole(by, "grow"); err != nil {
				return err
			}
		}
		if err := s.snapshot(by, fmt.Sprintf("s%d", i)); err != nil {
			return err
		}
		if err := s.send(by, s.anyRequests(4)); err != nil {
			return err
		}
	}
	return nil
}

// goOn has the second author write to the image, and do what the combination says.
func (s *subject) goOn() (err error) {
	by := s.b.second(s)
	defer func() { err = errors.Join(err, by.done()) }()
	return steps(
		func() error { return s.send(by, s.anyRequests(8)) },
		func() error { return s.whole(by, s.c.value(byThen)) },
		func() error { return s.send(by, s.anyRequests(6)) },
	)
}

// goBack has the first author write to the image once more.
func (s *subject) goBack() error {
	by := s.b.first(s)
	return errors.Join(s.send(by, s.anyRequests(6)), by.done())
}

// whole does something to the image as a whole.
func (s *subject) whole(by author, what string) error {
	switch what {
	case "none":
		return nil
	case "grow": // by QEMU, which shows again what was cut off, and clusters of an encrypted image that nobody has written to
		was := int64(len(s.disk))
		_, qemu := by.(theirs)
		if err := s.resize(by, s.grown()); err != nil || !qemu || !s.unknownAtFirst() && !s.c.is(byChange, "shrink") {
			return err
		}
		return s.send(by, []request{{deed: plainWrite, off: was, n: int64(len(s.disk)) - was, ink: inks()[1]}})
	case "shrink":
		return s.resize(by, s.shrunk())
	case "amend":
		return s.amend(by, s.amendment(by))
	case "rebase":
		return s.rebaseAnywhere(by)
	case "snapshot":
		return s.snapshot(by, "late")
	case "apply":
		return s.apply(by, s.snapshots[s.rng.IntN(len(s.snapshots))].name)
	case "delete":
		return s.remove(by, s.snapshots[s.rng.IntN(len(s.snapshots))].name)
	case "compress":
		return s.send(by, s.requests(3, compressedWrite))
	case "compact":
		return by.compact()
	case "stream":
		return s.stream(by)
	}
	return fmt.Errorf("nobody knows how to %s", what)
}

// rebaseAnywhere puts another backing file behind the image, or none.
func (s *subject) rebaseAnywhere(by author) error {
	if s.backing != nil && s.rng.IntN(2) == 0 {
		return s.rebase(by, nil)
	}
	to, err := s.b.base("qcow2", (s.c.size()/2+64<<10)&^511)
	if err != nil {
		return err
	}
	return s.rebase(by, to)
}

// amendment is what amend changes; what is zero stays.
type amendment struct {
	version, refcountBits int
	toggleLazy            bool
}

// mostCounts is how many refcounts may be in a block for QEMU to change their width: with 16384 it takes a third of a second, and with the
// 16777216 that are possible half an hour.
const mostCounts = 16384

// amendment returns a change that the image allows, and so does what it is to be used for.
func (s *subject) amendment(by author) amendment {
	if s.version == 2 {
		return amendment{version: 3}
	}
	list := []amendment{{toggleLazy: true}}
	compressed := !s.c.is(byCompression, "none") || s.c.is(byThen, "compress")
	_, slow := by.(theirs)
	for _, bits := range []int{1, 2, 4, 8, 16, 32, 64} {
		if slow && s.cluster()*8/int64(min(bits, s.refcountBits)) > mostCounts {
			continue
		}
		if bits != s.refcountBits && (bits >= 16 || !compressed && len(s.snapshots) == 0 && !s.c.is(byThen, "snapshot")) {
			list = append(list, amendment{refcountBits: bits})
		}
	}
	plain := []condition{is(byExtended, "off"), is(byCompression, "none", "zlib"), is(byData, "none"), is(byBitmaps, "0"), is(bySnapshots, "0")}
	if !s.lazy && s.refcountBits == 16 && !slices.ContainsFunc(plain, func(w condition) bool { return !s.c.m.test(w).met(&s.c) }) {
		list = append(list, amendment{version: 2}, amendment{version: 2}, amendment{version: 2})
	}
	return list[s.rng.IntN(len(list))]
}
