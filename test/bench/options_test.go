package main

import (
	"slices"
	"testing"
	"time"
)

func TestOptions(t *testing.T) {
	quick, err := parseOptions(nil)
	if err != nil {
		t.Fatal(err)
	}
	full, err := parseOptions([]string{"-full", "-rounds", "2", "-depths", "8,32", "-copy-size", "2G"})
	if err != nil {
		t.Fatal(err)
	}
	if quick.rounds != 3 || quick.limit >= 15*time.Minute || quick.copySize != 1<<30 || !slices.Equal(quick.depths, []int{1, 16}) {
		t.Errorf("quick: %+v", quick)
	}
	if full.rounds != 2 || full.copySize != 2<<30 || !slices.Equal(full.depths, []int{8, 32}) || full.runtime != 2*time.Second {
		t.Errorf("full: %+v", full)
	}
	var names []string
	for _, s := range newServers(1 << 30) {
		if quick.chosen(s) {
			names = append(names, s.Name)
		}
		if full.chosen(s) == s.extra {
			t.Errorf("a full run has %s: %t", s.Name, full.chosen(s))
		}
	}
	if want := []string{"qcow-csi", "qemu-nbd", "qemu-storage-daemon", "nbdkit file", "nbdkit null", "raw"}; !slices.Equal(names, want) {
		t.Errorf("a quick run has %q", names)
	}
	for _, wrong := range [][]string{
		{"x"},
		{"-depths", "0"},
		{"-depths", "1,,2"},
		{"-clients", "dd"},
		{"-servers", "("},
		{"-rounds", "0"},
		{"-rounds", "x"},
		{"-runtime", "0s"},
		{"-copy-size", "4q"},
		{"-copy-size", "1000"},
		{"-image-size", "1m"},
	} {
		if o, err := parseOptions(wrong); err == nil {
			t.Errorf("%q: %+v", wrong, o)
		}
	}
}
