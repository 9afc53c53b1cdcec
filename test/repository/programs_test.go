package repository_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// runners are the functions whose first string names a program, by the name they are called by.
var runners = []string{"run", "exec.Command", "exec.CommandContext", "exec.LookPath"}

// executed finds the programs that the driver runs, each with a file that runs it: the first string given to a runner, and
// the first string of a []string, a command line, where that is a program of this machine.
func executed(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for path, text := range files(t) {
		top, _, _ := strings.Cut(path, "/")
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") ||
			!slices.Contains([]string{"cmd", "driver", "nbdexport", "qcow"}, top) {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if slices.Contains(runners, called(n.Fun)) {
					program, ok := firstString(n.Args[:min(2, len(n.Args))])
					if ok && program != "/proc/self/exe" { // the driver itself
						found[program] = path
					}
				}
			case *ast.CompositeLit:
				if program, ok := firstString(n.Elts[:min(1, len(n.Elts))]); ok && isStrings(n.Type) {
					if _, err := exec.LookPath(program); err == nil {
						found[program] = path
					}
				}
			}
			return true
		})
	}
	return found
}

// called spells the function of a call: f or pkg.f.
func called(fun ast.Expr) string {
	switch fun := fun.(type) {
	case *ast.Ident:
		return fun.Name
	case *ast.SelectorExpr:
		if pkg, ok := fun.X.(*ast.Ident); ok {
			return pkg.Name + "." + fun.Sel.Name
		}
	}
	return ""
}

func firstString(values []ast.Expr) (string, bool) {
	for _, v := range values {
		if literal, ok := v.(*ast.BasicLit); ok && literal.Kind == token.STRING {
			s, err := strconv.Unquote(literal.Value)
			return s, err == nil
		}
	}
	return "", false
}

// isStrings tells whether the type of a composite literal is []string.
func isStrings(typ ast.Expr) bool {
	array, ok := typ.(*ast.ArrayType)
	if !ok {
		return false
	}
	element, ok := array.Elt.(*ast.Ident)
	return ok && element.Name == "string"
}

// TestExecutedPrograms keeps the search honest: a rewrite that hides the programs from it must teach it the new form.
func TestExecutedPrograms(t *testing.T) {
	require.Tool(t, "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs")
	found := executed(t)
	for _, want := range []string{
		"mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "resize2fs", "xfs_growfs", "btrfs", "blkid", "mount", "umount", "modprobe",
	} {
		if found[want] == "" {
			t.Errorf("%s was not found in the sources", want)
		}
	}
}

// TestPrerequisites checks that test/prerequisites knows every program that a test requires.
func TestPrerequisites(t *testing.T) {
	known := map[string]bool{"go": true, "apt-cache": true, "dpkg": true} // on any machine that tests, and on any Debian
	for line := range strings.Lines(read(t, "test/prerequisites/tools")) {
		if words := strings.Fields(line); len(words) >= 3 && words[0] != "#" {
			known[words[0]] = true
		}
	}
	for path, text := range files(t) {
		if !strings.HasSuffix(path, ".go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || called(call.Fun) != "require.Tool" {
				return true
			}
			for _, arg := range call.Args {
				if program, ok := firstString([]ast.Expr{arg}); ok && !known[program] {
					t.Errorf("%s requires %s, which test/prerequisites/tools does not list", path, program)
				}
			}
			return true
		})
	}
}
