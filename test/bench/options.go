package main

import (
	"errors"
	"flag"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// options are what the flags say.
type options struct {
	full         bool
	servers      *regexp.Regexp // nil: all but the extra ones
	workloads    *regexp.Regexp
	fioWorkloads *regexp.Regexp // those for which fio is a client, too
	clients      []string
	depths       []int
	connections  []int
	rounds       int
	runtime      time.Duration // of one measurement
	limit        time.Duration
	imageSize    int64 // bytes, of an image full of data
	copySize     int64 // bytes, that nbdcopy copies
	idle         int   // exports of one process
	dir, copyDir string

	json, svg, markdown, from string // files
}

// Presets are values of flags: the first is that of a run that ends within 15 minutes, the second that of a full one.
var presets = map[string][2]string{
	"servers":       {"^(qcow-csi|qemu-nbd|qemu-storage-daemon|nbdkit file|nbdkit null|raw)$", ""},
	"workloads":     {" 4k|1M|nbdcopy", ""},
	"fio-workloads": {"random read 4k", ""},
	"depths":        {"1,16", "1,16,64"},
	"connections":   {"1,4", "1,4"},
	"clients":       {"load,fio", "load,fio"},
	"rounds":        {"3", "5"},
	"runtime":       {"700ms", "2s"},
	"limit":         {"14m", "5h"},
	"copy-size":     {"1g", "4g"},
}

// parseOptions reads the command line.
func parseOptions(args []string) (*options, error) {
	o := &options{}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.BoolVar(&o.full, "full", false, "measure everything, for hours: other defaults of the flags that have two")
	define := func(name, usage string, set func(string) error) {
		flags.Func(name, fmt.Sprintf("%s (default %q, with -full %q)", usage, presets[name][0], presets[name][1]), set)
	}
	define("servers", "regular expression of the servers to compare; empty: all but other aio modes", pattern(&o.servers))
	define("workloads", "regular expression of the workloads", pattern(&o.workloads))
	define("fio-workloads", "regular expression of the workloads that fio does, too", pattern(&o.fioWorkloads))
	define("clients", "load, fio or both", func(s string) error {
		o.clients = strings.Split(s, ",")
		for _, c := range o.clients {
			if !slices.Contains([]string{"load", "fio"}, c) {
				return errors.New("clients are load and fio")
			}
		}
		return nil
	})
	define("depths", "requests in flight on a connection", numbers(&o.depths))
	define("connections", "connections at a time", numbers(&o.connections))
	define("rounds", "measurements of which the median is taken", func(s string) (err error) {
		o.rounds, err = strconv.Atoi(s)
		return err
	})
	define("runtime", "of one measurement; fio takes whole seconds", duration(&o.runtime))
	define("limit", "no round begins that would probably end later than this", duration(&o.limit))
	define("copy-size", "bytes that nbdcopy copies, such as 4g", size(&o.copySize))
	o.imageSize = 1 << 30
	flags.Func("image-size", `bytes of images that are full of data (default "1g")`, size(&o.imageSize))
	flags.IntVar(&o.idle, "idle-exports", 32, "idle exports of which the memory is measured; 0: none")
	flags.StringVar(&o.dir, "dir", "", "folder for images, on a filesystem with room for 10 times image-size; default: that of temporary files")
	flags.StringVar(&o.copyDir, "copy-dir", "", "folder for what nbdcopy copies; default: /dev/shm if the memory allows it, else that of the images")
	flags.StringVar(&o.json, "json", "", "write all samples to this file, after each round; - is the standard output, which then has no table")
	flags.StringVar(&o.svg, "svg", "", "draw the ratios into this file")
	flags.StringVar(&o.markdown, "markdown", "", "put the tables into the marked section of this file")
	flags.StringVar(&o.from, "from", "", "measure nothing: take the JSON that an earlier run wrote to this file")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for name, preset := range presets {
		if given[name] {
			continue
		}
		value := preset[0]
		if o.full {
			value = preset[1]
		}
		if err := flags.Set(name, value); err != nil {
			return nil, err
		}
	}
	switch {
	case flags.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.rounds < 1 || o.runtime <= 0 || o.idle < 0:
		return nil, errors.New("rounds and runtime must be more than nothing")
	case o.imageSize < 64*mib || o.imageSize%mib != 0 || o.copySize < mib || o.copySize%mib != 0 || o.imageSize > emptySize:
		return nil, errors.New("sizes must be multiples of 1 MiB, and an image at least 64 MiB")
	}
	return o, nil
}

// chosen tells whether a server is to be measured.
func (o *options) chosen(s server) bool {
	if o.servers.String() == "" {
		return !s.extra
	}
	return o.servers.MatchString(s.Name)
}

func pattern(to **regexp.Regexp) func(string) error {
	return func(s string) (err error) {
		*to, err = regexp.Compile(s)
		return err
	}
}

func numbers(to *[]int) func(string) error {
	return func(s string) error {
		*to = nil
		for word := range strings.SplitSeq(s, ",") {
			n, err := strconv.Atoi(word)
			if err != nil || n < 1 {
				return fmt.Errorf("%q is no number of 1 or more", word)
			}
			*to = append(*to, n)
		}
		return nil
	}
}

func duration(to *time.Duration) func(string) error {
	return func(s string) (err error) {
		*to, err = time.ParseDuration(s)
		return err
	}
}

// size reads a number of bytes with a letter, k, m or g, for powers of 1024.
func size(to *int64) func(string) error {
	return func(s string) error {
		digits := strings.TrimRight(strings.ToLower(s), "kmg")
		n, err := strconv.ParseInt(digits, 10, 40)
		if err != nil {
			return fmt.Errorf("%q is no number of bytes", s)
		}
		*to = n << map[string]int{"": 0, "k": 10, "m": 20, "g": 30}[strings.ToLower(s)[len(digits):]]
		return nil
	}
}
