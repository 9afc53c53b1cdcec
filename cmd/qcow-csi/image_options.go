package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/luks"
)

// optionList is the value of -o: NAME=VALUE, several with commas between them, as qemu-img has it. A comma in a value is doubled.
type optionList map[string]string

func (l optionList) Type() string { return "name=value,..." }

func (l optionList) String() string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(l)) {
		parts = append(parts, name+"="+strings.ReplaceAll(l[name], ",", ",,"))
	}
	return strings.Join(parts, ",")
}

// Set implements pflag.Value. Again it adds to what is there.
func (l optionList) Set(s string) error {
	return splitOptions(s, func(name, value string) error {
		l[name] = value
		return nil
	})
}

// splitOptions calls set with each NAME=VALUE of s.
func splitOptions(s string, set func(name, value string) error) error {
	const comma = "\x00"
	for part := range strings.SplitSeq(strings.ReplaceAll(s, ",,", comma), ",") {
		name, value, ok := strings.Cut(strings.ReplaceAll(part, comma, ","), "=")
		if !ok || name == "" {
			return fmt.Errorf("%q is not of the form NAME=VALUE", part)
		}
		if err := set(name, value); err != nil {
			return err
		}
	}
	return nil
}

// alias is a flag for one of the options.
type alias struct {
	list optionList
	name string
	kind string
}

func (a alias) String() string { return a.list[a.name] }
func (a alias) Type() string   { return a.kind }

// Set implements pflag.Value.
func (a alias) Set(s string) error {
	a.list[a.name] = s
	return nil
}

// mustBeOf refuses options that are none of the names, with a hint where there is one.
func (l optionList) mustBeOf(names []string, hints map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(l)) {
		switch {
		case slices.Contains(names, name):
		case hints[name] != "":
			return fmt.Errorf("option %s: %s", name, hints[name])
		default:
			return fmt.Errorf("option %s is none of %s", name, strings.Join(names, ", "))
		}
	}
	return nil
}

// reader reads options; err is the first error.
type optionReader struct {
	list optionList
	err  error
}

func (r *optionReader) has(name string) bool {
	_, ok := r.list[name]
	return ok
}

// read calls parse with the value of an option that is given.
func (r *optionReader) read(name string, parse func(value string) error) {
	if value, ok := r.list[name]; ok {
		if err := parse(value); err != nil {
			r.err = errors.Join(r.err, fmt.Errorf("option %s: %w", name, err))
		}
	}
}

func (r *optionReader) flag(name string) (set bool) {
	r.read(name, func(value string) error {
		set = value == "on"
		if value != "on" && value != "off" {
			return fmt.Errorf("%q is neither on nor off", value)
		}
		return nil
	})
	return set
}

// size reads a size that can't be 0, which is the default of the engine.
func (r *optionReader) size(name string) (n int) {
	r.read(name, func(value string) error {
		size, err := parseSize(value)
		n = int(size)
		if err == nil && size == 0 {
			err = errors.New("it can't be 0")
		}
		return err
	})
	return n
}

func (r *optionReader) number(name string) (n int) {
	r.read(name, func(value string) (err error) {
		n, err = strconv.Atoi(value)
		if err != nil || n <= 0 {
			return fmt.Errorf("%q is not a number above 0", value)
		}
		return nil
	})
	return n
}

// version reads which version of the format is asked for; 0 where none is.
func (r *optionReader) version() (version int) {
	r.read("compat", func(value string) error {
		var ok bool
		if version, ok = map[string]int{"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}[value]; !ok {
			return fmt.Errorf("%q is neither 1.1 nor 0.10", value)
		}
		return nil
	})
	return version
}

// creationOptions are the options of a new image.
var creationOptions = []string{
	"backing_file", "backing_fmt", "cluster_size", "compat", "compression_type", "data_file", "data_file_raw",
	"encrypt.cipher-alg", "encrypt.cipher-mode", "encrypt.format", "encrypt.hash-alg", "encrypt.iter-time", "encrypt.ivgen-alg", "encrypt.ivgen-hash-alg",
	"extended_l2", "lazy_refcounts", "preallocation", "refcount_bits",
}

var creationHints = map[string]string{ //nolint:gosec // names of options, no credentials
	"encrypt.key-secret": "a file has the passphrase, see --help",
	"size":               "the size is an argument",
	"encryption":         "encrypt.format=luks is what encrypts an image",
}

// errNoPassphrase: an image is to be encrypted. The options that come with it are complete but for the passphrase.
var errNoPassphrase = errors.New("an encrypted image needs a passphrase, which a file has: see --help")

// creation is how a command makes an image.
type creation struct {
	list       optionList
	backing    backingFlags
	passphrase *passphraseFile
}

// addCreationFlags adds the flags of a command that makes an image; letter is the one of the backing file.
func addCreationFlags(cmd *cobra.Command, letter string, passphrase *passphraseFile) *creation {
	c := &creation{list: optionList{}, passphrase: passphrase}
	flags := cmd.Flags()
	flags.VarP(c.list, "options", "o", "properties of the new image: "+strings.Join(creationOptions, ", "))
	flags.Var(alias{c.list, "cluster_size", "size"}, "cluster-size", "the same as -o cluster_size=SIZE")
	flags.Var(alias{c.list, "refcount_bits", "n"}, "refcount-bits", "the same as -o refcount_bits=N")
	c.backing.add(cmd, letter)
	return c
}

// options returns what the flags say of an image of this size. The data file is for the caller to make.
func (c *creation) options(size int64) (qcow.CreateOptions, error) {
	if err := c.list.mustBeOf(creationOptions, creationHints); err != nil {
		return qcow.CreateOptions{}, err
	}
	backing, err := c.backingFile()
	if err != nil {
		return qcow.CreateOptions{}, err
	}
	r := optionReader{list: c.list}
	o := qcow.CreateOptions{
		Size:          roundUp(size),
		ClusterSize:   r.size("cluster_size"),
		RefcountBits:  r.number("refcount_bits"),
		Version:       r.version(),
		LazyRefcounts: r.flag("lazy_refcounts"),
		ExtendedL2:    r.flag("extended_l2"),
		DataFileName:  c.list["data_file"],
		DataFileRaw:   r.flag("data_file_raw"),
		BackingFile:   backing.file,
		BackingFormat: string(backing.format),
	}
	r.read("compression_type", func(value string) error {
		switch value {
		case codec.Deflate.String():
		case codec.Zstd.String():
			o.Compression = codec.Zstd
		default:
			return fmt.Errorf("%q is neither zlib nor zstd", value)
		}
		return nil
	})
	r.read("preallocation", func(value string) (err error) {
		o.Preallocation, err = qcow.ParsePreallocation(value)
		return err
	})
	o.Encryption = c.encryption(&r)
	if r.err != nil || o.Encryption == nil {
		return o, r.err
	}
	if o.Encryption.Passphrase, err = c.passphrase.read(); err == nil && o.Encryption.Passphrase == nil {
		err = errNoPassphrase
	}
	return o, err
}

// backingFile returns what -b and -F say, or else -o.
func (c *creation) backingFile() (backingFlags, error) {
	b := c.backing
	if name, ok := c.list["backing_file"]; ok {
		b.file = name
	}
	if name, ok := c.list["backing_fmt"]; ok {
		if err := b.format.Set(name); err != nil {
			return b, fmt.Errorf("option backing_fmt: %w", err)
		}
	}
	return b, b.check()
}

// encryption returns how the image is to be encrypted, but for the passphrase; nil: not at all.
func (c *creation) encryption(r *optionReader) *qcow.EncryptionOptions {
	if !r.has("encrypt.format") {
		for name := range c.list {
			if strings.HasPrefix(name, "encrypt.") {
				r.err = errors.Join(r.err, fmt.Errorf("option %s without encrypt.format=luks", name))
			}
		}
		return nil
	}
	r.read("encrypt.format", func(value string) error {
		if value != "luks" {
			return fmt.Errorf("%q is not luks", value)
		}
		return nil
	})
	return &qcow.EncryptionOptions{CreateOptions: luks.CreateOptions{
		Cipher:      c.list["encrypt.cipher-alg"],
		Mode:        c.list["encrypt.cipher-mode"],
		IVGenerator: c.list["encrypt.ivgen-alg"],
		IVHash:      c.list["encrypt.ivgen-hash-alg"],
		Hash:        c.list["encrypt.hash-alg"],
		KeyOptions:  luks.KeyOptions{IterTime: r.iterTime()},
	}}
}

// iterTime reads how long a passphrase is to take, 0 where nothing is said.
func (r *optionReader) iterTime() time.Duration {
	return time.Duration(r.number("encrypt.iter-time")) * time.Millisecond
}
