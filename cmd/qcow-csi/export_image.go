package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// exportedImage is an image that is to be served, and how.
type exportedImage struct {
	access
	file            string
	name            string
	description     string
	readOnly        bool
	snapshot        string
	cache           cacheMode
	discard         choice
	detectZeroes    choice
	bitmaps         []string
	allocationDepth bool
	cacheSize       sizeValue
	runDir          string
}

func newExportedImage() exportedImage {
	return exportedImage{
		cache:        "writeback",
		runDir:       autoRunDir,
		discard:      choice{"unmap", []string{"unmap", "ignore"}},
		detectZeroes: choice{"off", []string{"off", "on", "unmap"}},
	}
}

// addFlags adds the flags that describe an image. What it is before is the default.
func (i *exportedImage) addFlags(flags *pflag.FlagSet) {
	flags.StringVarP(&i.name, "export-name", "x", i.name, "name of the export; clients that ask for none get the first one, too")
	flags.StringVarP(&i.description, "description", "D", i.description, "description of the export, for people")
	flags.BoolVarP(&i.readOnly, "read-only", "r", i.readOnly, "refuse writes, and let other readers open the image")
	flags.VarP(onlyQcow2{}, "format", "f", "format of the image, which can only be qcow2; it is never guessed")
	flags.StringVarP(&i.snapshot, "load-snapshot", "l", i.snapshot, "serve what an internal snapshot keeps, given by ID or name; read-only")
	flags.BoolVarP(&i.shared, "force-share", "U", i.shared,
		"with --read-only: open the image even while somebody writes to it; what is read then may contradict itself")
	flags.VarP(&i.passphrase, "passphrase-file", "", "file with the passphrase of encrypted images; one newline at its end is dropped")
	flags.Var(&i.cache, "cache", "how data gets to the disk: none, writeback, writethrough, directsync or unsafe")
	flags.VarPF(noCache{&i.cache}, "nocache", "n", "the same as --cache=none").NoOptDefVal = "true"
	flags.Var(&i.discard, "discard", "what becomes of space that clients give back: unmap gives it back, ignore keeps it")
	flags.Var(&i.detectZeroes, "detect-zeroes", "what becomes of writes of nothing but zeroes: off, on or unmap; they need no space with on, and give it back with unmap")
	flags.StringArrayVarP(&i.bitmaps, "bitmap", "B", i.bitmaps, "let clients ask what a dirty bitmap of the image says; can be repeated")
	flags.BoolVarP(&i.allocationDepth, "allocation-depth", "A", i.allocationDepth, "let clients ask at which depth of the backing chain data is")
	flags.StringVar(&i.runDir, "run-dir", i.runDir, "directory in memory for writes that were answered and are not linked yet, should the process be killed: a path, auto or none")
	flags.Var(&i.cacheSize, "cache-size", "memory for the tables of the image, at most; 0: 8M, and 128M for all images together")
}

// with returns the image that the options describe, as --export has them. What they don't say is as it is here, but for names.
func (i exportedImage) with(options string) (exportedImage, error) {
	i.name, i.description = "", ""
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	i.addFlags(flags)
	flags.StringVar(&i.file, "file", "", "the image")
	err := splitOptions(options, func(name, value string) error {
		if name == "name" {
			name = "export-name"
		}
		flag := flags.Lookup(name)
		switch {
		case flag == nil:
			return fmt.Errorf("there is no option %s", name)
		case flag.Value.Type() == "bool":
			value = map[string]string{"on": "true", "off": "false"}[value]
			if value == "" {
				return fmt.Errorf("option %s is on or off", name)
			}
		}
		if err := flag.Value.Set(value); err != nil {
			return fmt.Errorf("option %s: %w", name, err)
		}
		return nil
	})
	if err == nil && i.file == "" {
		err = errors.New("option file is missing")
	}
	return i, err
}

// check refuses what does not go together.
func (i *exportedImage) check() error {
	switch {
	case i.shared && !i.onlyRead():
		return errors.New("--force-share needs --read-only")
	case i.snapshot != "" && len(i.bitmaps) > 0:
		return errors.New("--bitmap speaks of the present content of the image, not of what --load-snapshot serves")
	case i.detectZeroes.value == "unmap" && i.discard.value == "ignore":
		return errors.New("--detect-zeroes=unmap needs --discard=unmap")
	}
	return nil
}

func (i *exportedImage) onlyRead() bool { return i.readOnly || i.snapshot != "" }

// openedImage is an image that is being served.
type openedImage struct {
	file     string
	img      *qcow.Image
	failures *failures
	backend  nbdexport.Backend
}

// open opens the image, and makes a backend of it.
func (i *exportedImage) open(ctx context.Context) (*openedImage, error) {
	logger := klog.FromContext(ctx).WithValues("image", i.file)
	img, err := i.openImage(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", i.file, err)
	}
	o := &openedImage{file: i.file, img: img, failures: newFailures(logger)}
	if r := img.Restored(); r != (qcow.Restored{}) {
		logger.Info("a process that served the image was killed", "clustersRestored", r.Clusters, "clustersLost", r.Lost)
	}
	if err := i.hasBitmaps(img); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", i.file, err), o.close())
	}
	o.backend = nbdexport.NewImageBackend(img, nbdexport.ImageOptions{
		IgnoreDiscard:   i.discard.value == "ignore",
		Direct:          i.cache.direct(),
		AllocationDepth: i.allocationDepth,
		Bitmaps:         i.bitmaps,
		Failed:          o.failures.report,
	})
	o.backend = i.cache.backend(o.backend)
	if i.detectZeroes.value != "off" {
		o.backend = zeroDetector{o.backend, i.detectZeroes.value == "unmap"}
	}
	return o, nil
}

// close closes the image. The backend must not be used any more.
func (o *openedImage) close() error {
	o.failures.finish()
	if err := o.img.Close(); err != nil {
		return fmt.Errorf("%s: %w", o.file, err)
	}
	return nil
}

// openedImages are all that one server serves.
type openedImages []*openedImage

func openImages(ctx context.Context, images []exportedImage) (opened openedImages, err error) {
	for i := range images {
		o, err := images[i].open(ctx)
		if err != nil {
			return nil, errors.Join(err, opened.close())
		}
		opened = append(opened, o)
	}
	return opened, nil
}

func (all openedImages) close() (err error) {
	for _, o := range all {
		err = errors.Join(err, o.close())
	}
	return err
}

// options returns how the engine opens the image. What it needs for writing only belongs here, too.
func (i *exportedImage) options() (o qcow.Options, err error) {
	o = qcow.Options{ReadOnly: i.onlyRead(), Snapshot: i.snapshot, Gate: i.gate(i.file)}
	if i.cacheSize > 0 {
		o.CacheBytes, o.Budget = int64(i.cacheSize), qcow.NewCacheBudget(int64(i.cacheSize))
	}
	o.Gate = i.cache.gate(o.Gate)
	o.Passphrase, err = i.passphrase.read()
	return o, err
}

// openImage opens the image as the image commands do. It is the one place where an image is opened to be served.
func (i *exportedImage) openImage(ctx context.Context) (img *qcow.Image, err error) {
	o, err := i.options()
	if err != nil {
		return nil, err
	}
	path, err := filepath.EvalSymlinks(i.file)
	if err != nil {
		return nil, err
	}
	opened, err := storage.OpenWith(path, storage.Options{Mode: i.mode(o.ReadOnly), Direct: i.cache.direct()})
	if err != nil {
		return nil, err
	}
	if !o.ReadOnly {
		o.Journal, err = openJournal(ctx, i.runDir, opened)
	}
	if err == nil {
		img, err = qcow.OpenContext(ctx, i.cache.file(opened), o)
	}
	if err != nil {
		err = errors.Join(err, opened.Close())
		if o.Journal != nil {
			err = errors.Join(err, o.Journal.Close())
		}
		return nil, err
	}
	return img, nil
}

// hasBitmaps refuses bitmaps that the image does not have, or that say nothing.
func (i *exportedImage) hasBitmaps(img *qcow.Image) error {
	if len(i.bitmaps) == 0 {
		return nil
	}
	bitmaps, err := img.Bitmaps()
	if err != nil {
		return err
	}
	for _, name := range i.bitmaps {
		switch at := slices.IndexFunc(bitmaps, func(b qcow.BitmapInfo) bool { return b.Name == name }); {
		case at < 0:
			return fmt.Errorf("it has no bitmap %q", name)
		case bitmaps[at].Inconsistent:
			return fmt.Errorf("bitmap %q was not saved after its last use, and says nothing", name)
		}
	}
	return nil
}

// choice is a flag that is one of some words.
type choice struct {
	value string
	words []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.words, "|") }

// Set implements pflag.Value.
func (c *choice) Set(s string) error {
	if !slices.Contains(c.words, s) {
		return fmt.Errorf("must be one of %s", strings.Join(c.words, ", "))
	}
	c.value = s
	return nil
}

// onlyQcow2 is a flag for those who are used to say what the format of an image is.
type onlyQcow2 struct{}

func (onlyQcow2) String() string { return formatQcow2 }
func (onlyQcow2) Type() string   { return formatQcow2 }

// Set implements pflag.Value.
func (onlyQcow2) Set(s string) error {
	if s != formatQcow2 {
		return errors.New("only qcow2 images are served; an overlay that is one serves a raw file too: qcow-csi image create -b FILE -F raw")
	}
	return nil
}
