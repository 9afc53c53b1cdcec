package judge

import (
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// keep leaves the log, the images before the operation, and those of each example in dir.
func keep(dir string, t *Trial, p *population, examples []Example, states map[string]*sampled) error {
	folder := func(name string) (string, error) {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return "", err
		}
		return path, writeFiles(path, t.Beside)
	}
	path, err := folder("before")
	if err != nil {
		return err
	}
	for _, image := range t.Images {
		if err := os.WriteFile(filepath.Join(path, image.Name), image.Initial, 0o600); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "log.txt"), []byte(storage.Trace(t.Ops)), 0o600); err != nil {
		return err
	}
	for _, e := range examples {
		path, err := folder(e.Kind)
		if err != nil {
			return err
		}
		text := fmt.Sprintf("%s\n%s\n", e.State, e.What)
		if err := os.WriteFile(filepath.Join(path, "state.txt"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	wanted := slices.Collect(maps.Values(states))
	slices.SortFunc(wanted, func(a, b *sampled) int { return cmp.Compare(a.first, b.first) })
	for s, contents := range p.contents(slices.Compact(wanted)) {
		for kind, which := range states {
			if which != s {
				continue
			}
			for i, content := range contents {
				if err := os.WriteFile(filepath.Join(dir, kind, t.Images[i].Name), content, 0o600); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
