package repository_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/qcow-csi/qcow-csi/"

// layer says what the packages of a folder may depend on, directly or through others. The standard library always.
type layer struct {
	folder  string   // relative to the module; the longest match holds
	own     []string // folders of this module besides it, with what is below them; less those that begin with "!"
	foreign []string // import paths of other modules, with what is below them
	any     bool     // every other module is allowed
}

var (
	system  = []string{"golang.org/x/sys"}
	engine  = []string{"github.com/klauspost/compress", "golang.org/x/crypto", "golang.org/x/sys"} // what qcow brings along
	netlink = []string{"github.com/mdlayher", "golang.org/x/net", "golang.org/x/sync"}
	fuse    = []string{"github.com/hanwen/go-fuse"}
	logging = []string{"k8s.io/klog/v2", "github.com/go-logr/logr"}
	mounts  = []string{"k8s.io/mount-utils", "k8s.io/utils", "github.com/moby/sys"}
)

// layers is the direction of imports, from the bottom up.
var layers = []layer{
	{folder: "qcow/format"},
	{folder: "qcow/storage", own: []string{"qcow/format"}, foreign: system},
	{folder: "qcow/check", own: []string{"qcow/format"}},
	{
		folder: "qcow", own: []string{"!qcow/check"},
		foreign: engine,
	},
	{
		folder: "nbdexport", own: []string{"qcow", "!qcow/check"},
		foreign: engine,
	},
	{
		folder: "driver/attach", own: []string{"nbdexport", "qcow", "!qcow/check"},
		foreign: slices.Concat(engine, netlink, fuse, logging),
	},
	{folder: "driver/mount", foreign: slices.Concat(system, mounts, logging)},
	{folder: "driver/pool", own: []string{"qcow"}, foreign: slices.Concat(engine, logging)},
	{folder: "driver", own: []string{"driver", "nbdexport", "qcow"}, any: true},
	{folder: "cmd", own: []string{"driver", "nbdexport", "qcow"}, any: true},
	{folder: "test", own: []string{"cmd", "driver", "nbdexport", "qcow", "test"}, any: true},
}

// forTests tells whether a package holds what only tests use: a suite or a fake.
func forTests(pkg string) bool {
	return within(pkg, "test") || strings.HasSuffix(pkg, "test") || strings.HasSuffix(pkg, "fake")
}

// layerOf finds the layer of a package, given relative to the module.
func layerOf(pkg string) (layer, bool) {
	if forTests(pkg) {
		pkg = "test"
	}
	best, found := layer{}, false
	for _, l := range layers {
		if within(pkg, l.folder) && len(l.folder) > len(best.folder) {
			best, found = l, true
		}
	}
	return best, found
}

// within tells whether path is folder or below it.
func within(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

// allows tells whether a package of the layer may depend on the import path.
func (l layer) allows(path string) bool {
	in := func(path string) func(string) bool {
		return func(folder string) bool { return within(path, folder) }
	}
	if own, ok := strings.CutPrefix(path, module); ok {
		if forTests(own) && l.folder != "test" {
			return false
		}
		if slices.ContainsFunc(l.own, func(f string) bool { return f[0] == '!' && within(own, f[1:]) }) {
			return false
		}
		return within(own, l.folder) || slices.ContainsFunc(l.own, in(own))
	}
	return l.any || slices.ContainsFunc(l.foreign, in(path))
}

// listed is what `go list` tells about a package.
type listed struct {
	ImportPath string
	Standard   bool
	DepOnly    bool
	Deps       []string
}

// TestImportDirection checks every dependency of every package, direct or not, against the layers. It looks at what is
// compiled into the package, its tests left out, as the linter's rule cannot be asked to.
func TestImportDirection(t *testing.T) {
	packages := list(t, "-deps", "./...")
	standard := map[string]bool{"C": true}
	for _, p := range packages {
		standard[p.ImportPath] = p.Standard
	}
	checked := 0
	for _, p := range packages {
		pkg, ours := strings.CutPrefix(p.ImportPath, module)
		if !ours {
			continue
		}
		checked++
		l, found := layerOf(pkg)
		if !found {
			t.Errorf("%s belongs to no layer", pkg)
			continue
		}
		for _, dep := range p.Deps {
			if !standard[dep] && !l.allows(dep) {
				t.Errorf("%s must not depend on %s", pkg, dep)
			}
		}
	}
	if checked < len(layers)/2 {
		t.Errorf("only %d packages were checked", checked)
	}
}

// TestLayersRefuse shows that the table above refuses what it is there to refuse.
func TestLayersRefuse(t *testing.T) {
	for _, c := range []struct {
		pkg, dep string
		want     bool
	}{
		{"qcow/format", "golang.org/x/sys/unix", false},
		{"qcow/check", module + "qcow", false},
		{"qcow/check", module + "qcow/format", true},
		{"qcow", module + "qcow/check", false},
		{"qcow", module + "driver/pool", false},
		{"nbdexport", module + "qcow/storage", true},
		{"nbdexport", "k8s.io/klog/v2", false},
		{"driver/attach/nbd", "github.com/mdlayher/genetlink", true},
		{"driver/attach/nbd", "google.golang.org/grpc", false},
		{"driver/attach/attachtest", module + "test/require", true},
		{"driver/mount", "github.com/container-storage-interface/spec/lib/go/csi", false},
		{"driver/pool", "google.golang.org/grpc/status", false},
		{"driver", "google.golang.org/grpc/status", true},
		{"driver", module + "driver/attach", true},
		{"driver", module + "driver/attach/attachfake", false},
		{"driver", module + "cmd/qcow-csi", false},
		{"cmd/qcow-csi", module + "test/require", false},
	} {
		l, found := layerOf(c.pkg)
		if !found {
			t.Errorf("%s belongs to no layer", c.pkg)
		} else if got := l.allows(c.dep); got != c.want {
			t.Errorf("%s may depend on %s: %v, want %v", c.pkg, c.dep, got, c.want)
		}
	}
}

// list runs go list in the root of the module.
func list(t *testing.T, args ...string) []listed {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Standard,DepOnly,Deps"}, args...)...)
	cmd.Dir = root
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	packages, err := decode(out)
	if err != nil {
		t.Fatal(err)
	}
	return packages
}

func decode(out []byte) ([]listed, error) {
	var packages []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		packages = append(packages, p)
	}
}
