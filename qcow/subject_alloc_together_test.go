package qcow_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const (
	meetingCluster = 4096
	meetingSize    = 16 * meetingCluster
)

// A step is a request to an image and what it makes of the disk.
type step struct {
	what   string // "write", "compressed", "zeroes" or "discard"
	off, n int64
	value  byte
}

func (s step) do(img *qcow.Image) (err error) {
	switch s.what {
	case "write":
		_, err = img.WriteAt(repeated(s.value, s.n), s.off)
	case "compressed":
		err = img.WriteCompressed(repeated(s.value, s.n), s.off)
	case "zeroes":
		err = img.WriteZeroes(s.off, s.n, true)
	default: // of whole clusters
		err = first(img.Discard(s.off, s.n), img.Flush())
	}
	return err
}

func (s step) on(want []byte) { copy(want[s.off:], repeated(s.value, s.n)) }

// A meeting is a request that comes while another one, which writes the middle of cluster 1 and so copies the rest of it, is writing its data.
type meeting struct {
	name   string
	before []step
	second step
	waits  bool // for the first, of which it touches a cluster
}

// heldUp is the request that is there first. No other data has its value.
var heldUp = step{"write", meetingCluster + 1024, 2048, 0xf1}

func meetings() []meeting {
	const c = meetingCluster
	write := func(off, n int64) step { return step{"write", off, n, 0xf2} }
	data := []step{{"write", 2 * c, c, 0xe1}}
	compressed := []step{{"compressed", 2 * c, c, 0xe2}}
	discarded := []step{{"write", c, 2 * c, 0xe3}, {"discard", c, c, 0}} // the place of cluster 1 is free, beside that of cluster 2
	return []meeting{
		{"before it in the cluster", nil, write(c, 512), true},
		{"behind it in the cluster", nil, write(c+3500, 500), true},
		{"on the same bytes", nil, write(c+1024, 2048), true},
		{"into the next cluster", nil, write(c+2048, c), true},
		{"in the next cluster, with a gap", nil, write(2*c+512, 512), false},
		{"in place, in the next cluster", data, write(2*c+512, 512), false},
		{"into the next cluster, which is allocated", data, write(c+2048, c), true},
		{"into the next cluster, which is its neighbour in the file", discarded, write(c+2048, c), true},
		{"into the next cluster, which is compressed", compressed, write(c+2048, c), true},
		{"in the next cluster, which is compressed", compressed, write(2*c+512, 512), false},
		{"in the cluster before", nil, write(512, 512), false},
		{"from the cluster before", nil, write(1024, c), true},
		{"all around", nil, write(512, 4*c), true},
		{"zeroes in the cluster", nil, step{"zeroes", c, 512, 0}, true},
		{"zeroes all around", nil, step{"zeroes", 0, 3 * c, 0}, true},
		{"zeroes in place of the cluster", nil, step{"zeroes", c, c, 0}, true},
		{"zeroes in place of the next cluster", data, step{"zeroes", 2 * c, c, 0}, false},
	}
}

// run does both requests in an image with these files.
func (x *meeting) run(t *testing.T, f files) {
	h := &hooked{File: f["top"]}
	img := open(t, h, qcow.Options{Gate: f.gate, Budget: qcow.NewCacheBudget(1 << 20), ReserveBytes: meetingCluster})
	for _, s := range x.before {
		if err := s.do(img); err != nil {
			t.Fatal(err)
		}
	}
	release := make(chan struct{})
	h.set(func() {
		h.beforeWrite = func(p []byte, _ int64) error {
			if slices.Contains(p, heldUp.value) {
				<-release
			}
			return nil
		}
	})
	var one, two error
	oneDone, twoDone := false, false
	go func() { one, oneDone = heldUp.do(img), true }()
	synctest.Wait()
	if oneDone {
		t.Fatal("the first request was not held up")
	}
	go func() { two, twoDone = x.second.do(img), true }()
	synctest.Wait()
	if twoDone == x.waits {
		t.Errorf("the second request has ended before the first: %v", twoDone)
	}
	close(release)
	synctest.Wait()
	if err := first(one, two, img.Close()); err != nil || !oneDone || !twoDone {
		t.Error(err, oneDone, twoDone)
	}
}

// Two requests meet in a cluster that one of them copies from a backing file: what they wrote is there, and around it what was there before. One that touches
// no cluster of the other does not wait.
func TestRequestsMeetWhileOneCopies(t *testing.T) {
	base := make([]byte, meetingSize)
	for i := range base {
		base[i] = byte(1 + i/100%200)
	}
	for _, x := range meetings() {
		t.Run(x.name, func(t *testing.T) {
			f := files{
				"base": storage.NewMemoryFrom(bytes.Clone(base)),
				"top":  overlay(t, qcow.CreateOptions{Size: meetingSize, ClusterSize: meetingCluster}, "base", "raw"),
			}
			synctest.Test(t, func(t *testing.T) { x.run(t, f) })
			want := bytes.Clone(base)
			for _, s := range append(x.before, heldUp, x.second) {
				s.on(want)
			}
			img := open(t, f["top"], qcow.Options{Gate: f.gate, ReadOnly: true})
			expect(t, "disk", diskOf(t, img), want)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
			(&chain{t: t, files: f}).expectClean("top")
		})
	}
}

// Two writes at a time allocate the same clusters, a sector apart: each sector has what one of them wrote.
func TestOverlappingAllocations(t *testing.T) {
	const n, rounds = 1 << 20, 10
	f := create(t, qcow.CreateOptions{Size: (rounds + 1) * (n + 4096)})
	img := open(t, restless(f), qcow.Options{})
	for i := range int64(rounds) {
		off := i * (n + 4096)
		var wg sync.WaitGroup
		for k := range int64(2) {
			wg.Go(func() {
				if _, err := img.WriteAt(repeated(byte(2*i+k+1), n), off+k*sector); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		got := make([]byte, n+2*sector)
		if _, err := img.ReadAt(got, off); err != nil {
			t.Fatal(err)
		}
		for at := int64(0); at < n+2*sector; at += sector {
			v := got[at]
			of := v == byte(2*i+1) && at < n || v == byte(2*i+2) && at >= sector && at < n+sector || v == 0 && at >= n+sector
			if !of || firstDifference(got[at:][:sector], repeated(v, sector)) >= 0 {
				t.Fatalf("round %d: the sector at %d begins with %#x", i, at, v)
			}
		}
	}
	closeClean(t, img, f)
}

// While a cluster that was given up is being punched nobody gets it: what is written meanwhile, where writes need not wait, is not what the
// punch takes away.
func TestPunchComesBeforeReuse(t *testing.T) {
	const cluster = 4096
	for name, unlink := range map[string]func(img *qcow.Image) error{
		"data": func(img *qcow.Image) error { return img.Discard(0, 8*cluster) },
		// A table of 4 KiB is for 2 MiB.
		"tables": func(img *qcow.Image) error { return img.Resize(context.Background(), 2<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newHandmade(t, qcow.CreateOptions{Size: 8 << 20, ClusterSize: cluster}, func(img *qcow.Image) {
				for off := int64(0); off < 8<<20; off += 2 << 20 {
					writeAt(t, img, repeated(1, 8*cluster), off)
				}
			})
			f := m.file()
			want := append(repeated(1, 8*cluster), make([]byte, 2<<20-8*cluster)...)
			if name == "data" {
				clear(want[:8*cluster])
			}
			synctest.Test(t, func(t *testing.T) {
				h := &hooked{File: f}
				img := open(t, h, qcow.Options{Budget: qcow.NewCacheBudget(1 << 20), ReserveBytes: cluster})
				release, punched := make(chan struct{}), map[int64]int64{}
				h.set(func() {
					h.beforePunch = func(off, n int64) error {
						if off >= int64(len(m.b)) {
							return nil // new clusters
						}
						punched[off] = n
						<-release
						return nil
					}
				})
				var unlinked error
				go func() { unlinked = first(unlink(img), img.Flush()) }()
				synctest.Wait()
				if len(punched) == 0 {
					t.Fatal("nothing is being punched")
				}
				written, failed := 0, error(nil)
				go func() {
					for c := int64(100); c < 200 && failed == nil; c++ {
						written, failed = img.WriteAt(repeated(byte(c), cluster), c*cluster)
						if name == "data" && failed == nil && c%10 == 0 { // not the flush that the punch belongs to
							failed = img.Flush()
						}
						copy(want[c*cluster:], repeated(byte(c), cluster))
					}
				}()
				synctest.Wait()
				if failed != nil || (written == cluster) != (name == "data") {
					t.Errorf("writes wait for a punch of %s: %v, %v", name, written == 0, failed)
				}
				for e, err := range img.Extents(100*cluster, 100*cluster) {
					if err != nil {
						t.Fatal(err)
					}
					for off, n := range punched {
						if host := int64(e.Host); e.Kind == qcow.ExtentData && host < off+n && off < host+e.Length {
							t.Errorf("%+v is where %d bytes at %#x are being punched", e, n, off)
						}
					}
				}
				close(release)
				synctest.Wait()
				if unlinked != nil {
					t.Error(unlinked)
				}
				expectAt(t, img, want, 0)
				if err := img.Close(); err != nil {
					t.Error(err)
				}
			})
			expectClean(t, f.Bytes())
			img := open(t, f, qcow.Options{ReadOnly: true})
			expectAt(t, img, want, 0)
			if err := img.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// Requests of many queues to the same few tables and clusters, which are evicted, unlinked and given back all the time.
func TestManyQueues(t *testing.T) {
	const queues, each = 16, 8<<10 + 100
	for _, seed := range testSeeds(t, 1, 30) {
		rng := rand.New(rand.NewPCG(seed, 0))
		f := create(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: 1 << rng.IntN(7)})
		img := open(t, restless(f), qcow.Options{CacheBytes: 1, ReserveBytes: 1})
		tr := newTraffic(t, img, seed, queues, each, 32<<10)
		tr.run(60)
		closeClean(t, img, f)
		tr.verifyAll(f)
	}
}
