package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

func TestFlagsFromEnvironment(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		env  map[string]string
		dir  string
		max  int
		says string
	}{
		"nothing":               {nil, nil, "default", 0, ""},
		"environment":           {nil, map[string]string{"QCOW_CSI_STORAGE_DIR": "env", "QCOW_CSI_MAX": "5"}, "env", 5, ""},
		"command line":          {[]string{"--storage-dir", "arg"}, map[string]string{"QCOW_CSI_STORAGE_DIR": "env"}, "arg", 0, ""},
		"empty is a value":      {nil, map[string]string{"QCOW_CSI_STORAGE_DIR": ""}, "", 0, ""},
		"other variables":       {nil, map[string]string{"STORAGE_DIR": "x", "QCOW_CSI_REQUIRE": "all", "QCOW_CSI_HELP": "x"}, "default", 0, ""},
		"what cannot be parsed": {nil, map[string]string{"QCOW_CSI_MAX": "many"}, "default", 0, "QCOW_CSI_MAX"},
	} {
		t.Run(name, func(t *testing.T) {
			flags := pflag.NewFlagSet("", pflag.ContinueOnError)
			dir, most := flags.String("storage-dir", "default", ""), flags.Int("max", 0, "")
			flags.Bool("help", false, "")
			if err := flags.Parse(c.args); err != nil {
				t.Fatal(err)
			}
			err := flagsFromEnvironment(flags, func(name string) (string, bool) {
				value, ok := c.env[name]
				return value, ok
			})
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
			if *dir != c.dir || *most != c.max {
				t.Errorf("%q, %d; want %q, %d", *dir, *most, c.dir, c.max)
			}
		})
	}
}

// TestHelp: every command says what it does, and every one that does something shows how.
func TestHelp(t *testing.T) {
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: %q", cmd.CommandPath(), cmd.Short)
		}
		if cmd.Example == "" && cmd.Name() != "version" {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s --%s: no usage", cmd.CommandPath(), f.Name)
			}
		})
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(newRootCommand())
}

func TestVersion(t *testing.T) {
	version = "v1.2.3"
	t.Cleanup(func() { version = "" })
	root := newRootCommand()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetArgs([]string{"version"})
	if err := root.Execute(); err != nil || !strings.HasPrefix(out.String(), "qcow-csi v1.2.3, CSI 1.13.0, go") {
		t.Errorf("%q, %v", &out, err)
	}
	version = ""
	if programVersion() == "" {
		t.Error("a build without a version has none at all, not even an unknown one")
	}
}

func TestLogging(t *testing.T) {
	t.Cleanup(klog.ClearLogger)
	for _, c := range []struct {
		logging
		ok bool
	}{{logging{"text", 3}, true}, {logging{"json", 4}, true}, {logging{"xml", 0}, false}} {
		err := c.start()
		if (err == nil) != c.ok {
			t.Errorf("%+v: %v", c.logging, err)
		}
		if c.ok && (!klog.Background().V(c.verbosity).Enabled() || klog.Background().V(c.verbosity+1).Enabled()) {
			t.Errorf("%+v: wrong verbosity", c.logging)
		}
	}
	if err := (&logging{format: "text"}).start(); err != nil {
		t.Error(err)
	}
}
