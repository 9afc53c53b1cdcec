package qcow_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// modelImage and modelData are what the image of a scenario and its data file are called.
const (
	modelImage = "image.qcow2"
	modelData  = "data"
)

// A modelKind is a kind of image: what it is created with, and what lies below it.
type modelKind struct {
	name     string
	o        qcow.CreateOptions
	external bool    // the data is in a file of its own
	luks     bool    // it is encrypted
	journal  bool    // it is opened with a journal
	below    []layer // its backing files, the lowest first
	other    []layer // what it may be rebased onto besides
}

// A modelFile is a file that is, or may become, a backing file of the image. What it reads as only Commit changes.
type modelFile struct {
	name, format string
	luks         bool
	content      []byte
	below        string // its own backing file
}

// A modelStart is what a scenario begins with.
type modelStart struct {
	kind  modelKind
	files map[string][]byte
	pool  []modelFile
	chain string // the backing file
	want  []byte
}

// modelKinds are every refcount width with small, middle and large clusters, and what else an image can be.
func modelKinds() []modelKind {
	var kinds []modelKind
	for _, cluster := range []int{512, 1024, 4096, 64 << 10, 2 << 20} {
		for _, width := range []int{1, 2, 4, 8, 16, 32, 64} {
			kinds = append(kinds, modelKind{
				name: fmt.Sprintf("cluster=%d/refcount=%d", cluster, width),
				o:    qcow.CreateOptions{Size: 3<<20 + 3*sector, ClusterSize: cluster, RefcountBits: width},
			})
		}
	}
	raw := []layer{{kind: "raw", size: 300 << 10}}
	for name, k := range map[string]modelKind{
		"version2":                 {o: qcow.CreateOptions{Version: 2, ClusterSize: 4096}},
		"version2-small":           {o: qcow.CreateOptions{Version: 2, ClusterSize: 512}},
		"version2-over-short":      {o: qcow.CreateOptions{Version: 2, ClusterSize: 2048}, below: []layer{{kind: "v2", size: 200<<10 + 512, cluster: 4096}}, other: raw},
		"version2-over-long":       {o: qcow.CreateOptions{Version: 2}, below: []layer{{kind: "raw", size: 2 << 20}}, other: raw},
		"lazy":                     {o: qcow.CreateOptions{LazyRefcounts: true, ClusterSize: 1024, RefcountBits: 2}},
		"zstd":                     {o: qcow.CreateOptions{Compression: codec.Zstd, ClusterSize: 8192}},
		"subclusters":              {o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}},
		"subclusters-large":        {o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 256 << 10, RefcountBits: 4}},
		"subclusters-preallocated": {o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 32 << 10, Preallocation: qcow.PreallocationMetadata}, below: []layer{{size: 500 << 10, cluster: 4096}}, other: raw},
		"subclusters-over-raw":     {o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}, below: []layer{{kind: "raw", size: 400001}}, other: raw},
		"subclusters-over-same":    {o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 64 << 10, RefcountBits: 8}, below: []layer{{kind: "extended", size: 3 << 20, cluster: 32 << 10}}, other: raw},
		"short-raw":                {o: qcow.CreateOptions{ClusterSize: 4096}, below: []layer{{kind: "raw", size: 100001}}, other: []layer{{size: 2 << 20, cluster: 2048}}},
		"long-raw":                 {o: qcow.CreateOptions{ClusterSize: 512, RefcountBits: 1}, below: []layer{{kind: "raw", size: 2<<20 + 77}}, other: raw},
		"compressed-below":         {o: qcow.CreateOptions{ClusterSize: 1024}, below: []layer{{kind: "compressed", size: 256 << 10, cluster: 4096}}, other: raw},
		"deep":                     {o: qcow.CreateOptions{ClusterSize: 2048}, below: []layer{{kind: "raw", size: 70 << 10}, {size: 500 << 10}, {kind: "v2", size: 300<<10 + 512, cluster: 1024}}, other: []layer{{kind: "raw", size: 250 << 10}, {size: 90 << 10}}},
		"secret-below":             {o: qcow.CreateOptions{ClusterSize: 4096}, below: []layer{{kind: "luks", size: 400 << 10, cluster: 4096}}, other: raw},
		"encrypted":                {luks: true},
		"encrypted-version2":       {luks: true, o: qcow.CreateOptions{Version: 2, ClusterSize: 1024}},
		"encrypted-narrow":         {luks: true, o: qcow.CreateOptions{ClusterSize: 512, RefcountBits: 1}},
		"encrypted-subclusters":    {luks: true, o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}, below: []layer{{kind: "luks", size: 300 << 10, cluster: 8192}, {size: 600 << 10, cluster: 4096}}, other: raw},
		"encrypted-preallocated":   {luks: true, o: qcow.CreateOptions{ClusterSize: 4096, Preallocation: qcow.PreallocationMetadata}},
		"data-file":                {external: true, o: qcow.CreateOptions{ClusterSize: 4096}},
		"data-file-raw":            {external: true, o: qcow.CreateOptions{ClusterSize: 4096, DataFileRaw: true}},
		"data-file-subclusters":    {external: true, o: qcow.CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}, below: []layer{{size: 700 << 10, cluster: 2048}}, other: raw},
		"data-file-encrypted":      {external: true, luks: true, o: qcow.CreateOptions{ClusterSize: 1024}},
		"preallocated-falloc":      {o: qcow.CreateOptions{ClusterSize: 512, Preallocation: qcow.PreallocationFalloc}},
		"preallocated-full":        {o: qcow.CreateOptions{RefcountBits: 32, Preallocation: qcow.PreallocationFull}},
	} {
		k.name, k.o.Size = name, 1<<20+5*sector
		kinds = append(kinds, k)
		if len(k.below) > 0 || k.luks {
			k.name, k.journal = name+"-journal", true
			kinds = append(kinds, k)
		}
	}
	slices.SortStableFunc(kinds, func(a, b modelKind) int { return strings.Compare(a.name, b.name) })
	return kinds
}

// randomModelKind draws every property of an image.
func randomModelKind(rng *rand.Rand) modelKind {
	k := modelKind{name: "random"}
	o := &k.o
	o.Version = 2 + min(rng.IntN(5), 1)
	o.ClusterSize = 512 << rng.IntN(9) // up to 128 KiB
	if rng.IntN(16) == 0 {
		o.ClusterSize = 256 << 10 << rng.IntN(4)
	}
	k.luks = rng.IntN(5) == 0
	k.journal = rng.IntN(2) == 0
	if o.Version == 3 {
		o.RefcountBits = 1 << rng.IntN(7)
		o.LazyRefcounts = rng.IntN(4) == 0
		if o.ExtendedL2 = rng.IntN(4) == 0; o.ExtendedL2 {
			o.ClusterSize = max(o.ClusterSize, 16<<10)
		}
		if rng.IntN(4) == 0 {
			o.Compression = codec.Zstd
		}
		if k.external = rng.IntN(6) == 0; k.external {
			o.DataFileRaw = rng.IntN(2) == 0
		}
	}
	o.Size = (200<<10 + rng.Int64N(1<<20)) / sector * sector
	if o.ClusterSize > 256<<10 {
		o.Size += 2 << 20
	}
	if rng.IntN(3) == 0 && !o.DataFileRaw {
		k.below = randomLayers(rng, 1+rng.IntN(3))
	}
	if !o.DataFileRaw && rng.IntN(2) == 0 {
		k.other = randomLayers(rng, 1+rng.IntN(2))
	}
	if len(k.below) == 0 || o.ExtendedL2 {
		o.Preallocation = qcow.Preallocation(max(rng.IntN(8)-4, 0))
	}
	return k
}

// randomLayers draws n files of a chain.
func randomLayers(rng *rand.Rand, n int) []layer {
	var layers []layer
	for i := range n {
		kinds := []string{"", "", "v2", "extended", "luks"}
		if i == 0 {
			kinds = append(kinds, "raw", "raw", "compressed")
		}
		l := layer{kind: kinds[rng.IntN(len(kinds))], size: (32<<10 + rng.Int64N(1<<20)) / sector * sector, cluster: 512 << rng.IntN(8)}
		if l.kind == "extended" {
			l.cluster = max(l.cluster, 16<<10)
		}
		if l.kind == "luks" {
			l.cluster = max(l.cluster, 4096) // the header has to fit what one refcount block describes
		}
		if l.kind == "raw" && rng.IntN(2) == 0 {
			l.size += rng.Int64N(sector)
		}
		layers = append(layers, l)
	}
	return layers
}

// start makes an image of the kind, and what lies below it.
func (k modelKind) start(t testing.TB, rng *rand.Rand) *modelStart {
	t.Helper()
	s := &modelStart{kind: k, files: map[string][]byte{}, want: make([]byte, k.o.Size)}
	for i, layers := range [][]layer{k.below, k.other} {
		if len(layers) == 0 {
			continue
		}
		c := newChain(t, rng, layers...)
		if i == 1 {
			c.rename()
		}
		for n, name := range c.names {
			f := modelFile{name: name, format: formatOf(c.kinds[n]), luks: c.kinds[n] == "luks", content: c.content(name)}
			if n > 0 {
				f.below = c.names[n-1]
			}
			s.files[name], s.pool = contentOf(t, c.files[name]), append(s.pool, f)
		}
		if i == 0 {
			s.chain = c.top()
			copy(s.want, c.want)
		}
	}
	f, data := storage.NewMemory(), storage.NewMemory()
	o := k.o
	if s.chain != "" {
		o.BackingFile, o.BackingFormat = s.chain, formatOf(k.below[len(k.below)-1].kind)
	}
	if k.luks {
		o.Encryption = &qcow.EncryptionOptions{Passphrase: []byte(passphrase), CreateOptions: luks.CreateOptions{KeyOptions: cheapKey(rng)}}
	}
	if k.external {
		o.DataFile, o.DataFileName = data, modelData
	}
	if err := qcow.Create(f, o); err != nil {
		t.Fatalf("create %+v: %v", o, err)
	}
	s.files[modelImage] = f.Bytes()
	if k.external {
		s.files[modelData] = data.Bytes()
	}
	return s
}

// cheapKey says how passphrases are stored so that trying one takes little time, and the same bytes come of the same seed.
func cheapKey(rng *rand.Rand) luks.KeyOptions {
	var seed [32]byte
	scramble(seed[:], rng.Uint64())
	return luks.KeyOptions{Iterations: luks.MinIterations, Random: rand.NewChaCha8(seed)}
}

// open returns the files of the start, each as a copy.
func (s *modelStart) open() files {
	opened := files{}
	for name, b := range maps.All(s.files) {
		opened[name] = storage.NewMemoryFrom(bytes.Clone(b))
	}
	return opened
}
