package attach_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// candidate is an attacher that can do no more than be probed.
type candidate struct {
	attach.Attacher
	name string
	err  error
}

func (c *candidate) Name() string                { return c.name }
func (c *candidate) Probe(context.Context) error { return c.err }

func TestSelect(t *testing.T) {
	missing := fmt.Errorf("%w: the kernel has no NBD client", attach.ErrUnavailable)
	able := func(name string) *candidate { return &candidate{name: name} }
	unable := func(name string) *candidate { return &candidate{name: name, err: missing} }
	for _, test := range []struct {
		name       string
		candidates []attach.Attacher
		taken      string
		reason     string // a part of it, or of the error's text
		err        error
	}{
		{attach.Auto, []attach.Attacher{able("nbd"), able("fuse")}, "nbd", "comes first", nil},
		{attach.Auto, []attach.Attacher{unable("nbd"), able("fuse")}, "fuse", "nbd: attacher is unavailable: the kernel has no NBD client", nil},
		{attach.Auto, []attach.Attacher{unable("nbd"), unable("fuse")}, "", "fuse: attacher is unavailable", attach.ErrUnavailable},
		{attach.Auto, nil, "", "want auto", attach.ErrInvalid},
		{"fuse", []attach.Attacher{able("nbd"), able("fuse")}, "fuse", "asked for by name", nil},
		{"nbd", []attach.Attacher{unable("nbd"), able("fuse")}, "", "nbd: attacher is unavailable: the kernel has no NBD client", attach.ErrUnavailable},
		{"ublk", []attach.Attacher{able("nbd"), able("fuse")}, "", `no attacher is called "ublk": want auto or one of nbd, fuse`, attach.ErrInvalid},
		{"", []attach.Attacher{able("nbd")}, "", "want auto or one of nbd", attach.ErrInvalid},
	} {
		taken, reason, err := attach.Select(t.Context(), test.name, test.candidates...)
		if !errors.Is(err, test.err) {
			t.Errorf("%q: %v, want %v", test.name, err, test.err)
		}
		if err != nil {
			reason = err.Error()
		}
		got := ""
		if taken != nil {
			got = taken.Name()
		}
		if got != test.taken || !strings.Contains(reason, test.reason) {
			t.Errorf("%q: took %q because %q; want %q because %q", test.name, got, reason, test.taken, test.reason)
		}
	}
}
