package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

// logging is how the program logs, to standard error: 0 what an operator wants to know, 2 every call that changes
// something, 4 its content, 6 and more the calls that come all the time.
type logging struct {
	format    string
	verbosity int
}

func (l *logging) addFlags(flags *pflag.FlagSet) {
	flags.StringVar(&l.format, "logging-format", "text", `format of the log: "text" or "json"`)
	flags.IntVarP(&l.verbosity, "v", "v", 0, "how much is logged: 0 to 10")
}

func (l *logging) start() error {
	var flags flag.FlagSet
	klog.InitFlags(&flags)
	if err := flags.Set("v", strconv.Itoa(l.verbosity)); err != nil {
		return err
	}
	switch l.format {
	case "text":
	case "json":
		level := slog.Level(-l.verbosity) // verbosity n of klog is level -n of slog
		klog.SetSlogLogger(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	default:
		return fmt.Errorf(`--logging-format is "text" or "json", not %q`, l.format)
	}
	return nil
}
