package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// hostile are names and ids that would leave the directory if anything let them.
var hostile = []string{
	"../escape", "..", ".", "/etc/passwd", "a/../../b", "volumes/x", "-a", "a-", "a/", "A", "ä", "a\x00b", "a b",
	"volume.json", "",
	strings.Repeat("a", maxIDLength+1), "..\\x", "%2e%2e/x", "~root",
}

func TestValidID(t *testing.T) {
	for _, id := range hostile {
		if ValidID(id) {
			t.Errorf("%q is valid", id)
		}
	}
	for _, id := range []string{"a", "0", "a-b", "pvc-8a0b-4711", strings.Repeat("a", maxIDLength)} {
		if !ValidID(id) {
			t.Errorf("%q is not valid", id)
		}
	}
}

func TestHostileIDsReachNothing(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p := openPool(t, dir)
	victim := mustCreate(t, p, "victim", mebibyte)
	// What would be hit: a volume outside the pool.
	if err := os.CopyFS(filepath.Join(outer, "escape"), os.DirFS(filepath.Join(dir, volumesDir, victim.ID))); err != nil {
		t.Fatal(err)
	}
	before := tree(t, outer)
	for _, id := range append(hostile, "../../escape", "../"+volumesDir+"/"+victim.ID, victim.ID+"/../"+victim.ID) {
		_, err := p.Get(t.Context(), id)
		wantClass(t, err, ErrNotFound)
		_, err = p.Acquire(t.Context(), id, false)
		wantClass(t, err, ErrNotFound)
		_, err = p.Expand(t.Context(), id, SizeRange{Required: 2 * mebibyte})
		wantClass(t, err, ErrNotFound)
		if err := p.Delete(t.Context(), id); err != nil {
			t.Errorf("delete %q: %v", id, err)
		}
	}
	if after := tree(t, outer); !slices.Equal(before, after) {
		t.Errorf("directory was %v, is %v", before, after)
	}
}

func TestHostileNamesAreOnlyNames(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "pool")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p := openPool(t, dir)
	names := []string{
		"../escape", "..", "/", "a/b", "\x00", "pvc-1/../../x", "ÄÖÜ ☃", "-", "A b", "a b",
		strings.Repeat("x", MaxNameLength), strings.Repeat("☃", 42),
	}
	ids := map[string]bool{}
	for _, name := range names {
		v := mustCreate(t, p, name, mebibyte)
		if !ValidID(v.ID) || v.Name != name || ids[v.ID] {
			t.Errorf("name %q has id %q and is %q", name, v.ID, v.Name)
		}
		ids[v.ID] = true
	}
	if entries, err := os.ReadDir(outer); err != nil || len(entries) != 1 {
		t.Errorf("outside the pool: %v, %v", entries, err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir)
	for _, name := range names {
		if v := mustCreate(t, p, name, mebibyte); !ids[v.ID] {
			t.Errorf("name %q was forgotten", name)
		}
	}
	for _, name := range []string{"", strings.Repeat("x", MaxNameLength+1), "\xff"} {
		_, err := p.Create(t.Context(), Spec{Name: name})
		wantClass(t, err, ErrInvalid)
	}
}

func TestIDShowsTheName(t *testing.T) {
	const name = "pvc-3c9a1f5e-8e0b-4f7d-9d2b-0a1b2c3d4e5f"
	one, two := newVolumeID(name), newVolumeID(name)
	if !strings.HasPrefix(one, name+"-") || one == two {
		t.Errorf("ids of %q: %q, %q", name, one, two)
	}
	if id := newVolumeID("☃"); !strings.HasPrefix(id, "volume-") {
		t.Errorf("id without a name: %q", id)
	}
}

func TestCreateAgain(t *testing.T) {
	p := newPool(t)
	spec := Spec{
		Name: "v", Size: SizeRange{Required: 10 * mebibyte, Limit: 20 * mebibyte}, ClusterSize: 4096, FilesystemType: "xfs",
	}
	first, err := p.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if first.Size != 10*mebibyte || first.ClusterSize != 4096 || first.FilesystemType != "xfs" ||
		first.Format.State != NeverFormatted {
		t.Errorf("created %+v", first)
	}
	for name, c := range map[string]struct {
		change func(s *Spec)
		class  error
	}{
		"the same":           {func(*Spec) {}, nil},
		"a range around it":  {func(s *Spec) { s.Size = SizeRange{Required: 1, Limit: 1 << 40} }, nil},
		"any size":           {func(s *Spec) { s.Size = SizeRange{} }, nil},
		"larger":             {func(s *Spec) { s.Size.Required = 11 * mebibyte }, ErrExists},
		"at most smaller":    {func(s *Spec) { s.Size = SizeRange{Limit: 9 * mebibyte} }, ErrExists},
		"other clusters":     {func(s *Spec) { s.ClusterSize = 0 }, ErrExists},
		"other filesystem":   {func(s *Spec) { s.FilesystemType = "" }, ErrExists},
		"nonsense":           {func(s *Spec) { s.ClusterSize = 1000 }, ErrInvalid},
		"negative":           {func(s *Spec) { s.Size.Required = -1 }, ErrInvalid},
		"no size fits":       {func(s *Spec) { s.Size.Limit = 1 }, ErrOutOfRange},
		"clusters too large": {func(s *Spec) { s.ClusterSize = 4 << 20 }, ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			s := spec
			c.change(&s)
			v, err := p.Create(t.Context(), s)
			if c.class != nil {
				wantClass(t, err, c.class)
			} else if err != nil || v != first {
				t.Errorf("got %+v, %v, want %+v", v, err, first)
			}
		})
	}
	if ids := list(t, p); len(ids) != 1 {
		t.Errorf("volumes: %v", ids)
	}
}

func TestSizes(t *testing.T) {
	const maxOf512 = 128 << 30 // clusters of 512 bytes
	for _, c := range []struct {
		r       SizeRange
		cluster int
		want    int64
		class   error
	}{
		{SizeRange{}, 0, DefaultSize, nil},
		{SizeRange{Required: 1}, 0, Granule, nil},
		{SizeRange{Required: Granule}, 0, Granule, nil},
		{SizeRange{Required: Granule + 1}, 0, 2 * Granule, nil},
		{SizeRange{Required: Granule + 1, Limit: 2 * Granule}, 0, 2 * Granule, nil},
		{SizeRange{Required: Granule + 1, Limit: 2*Granule - 1}, 0, 0, ErrOutOfRange},
		{SizeRange{Limit: 10*Granule + 5}, 0, 10 * Granule, nil},
		{SizeRange{Limit: 5}, 0, 0, ErrOutOfRange},
		{SizeRange{Limit: 4 << 30}, 0, DefaultSize, nil},
		{SizeRange{Required: 3, Limit: 2}, 0, 0, ErrOutOfRange},
		{SizeRange{Required: -1}, 0, 0, ErrInvalid},
		{SizeRange{Limit: -1}, 0, 0, ErrInvalid},
		{SizeRange{Required: 1<<63 - 1}, 0, 0, ErrOutOfRange},
		{SizeRange{Required: maxOf512}, 512, maxOf512, nil},
		{SizeRange{Required: maxOf512 + 1}, 512, 0, ErrOutOfRange},
	} {
		s := Spec{Name: "v", Size: c.r, ClusterSize: c.cluster}
		err := s.validate()
		var got int64
		if err == nil {
			got, err = c.r.choose(s.geometry())
		}
		if got != c.want || !errors.Is(err, c.class) {
			t.Errorf("%+v, clusters of %d: %d, %v; want %d, %v", c.r, c.cluster, got, err, c.want, c.class)
		}
	}
}

func TestDelete(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", mebibyte)

	h := mustAcquire(t, p, v.ID)
	wantClass(t, p.Delete(t.Context(), v.ID), ErrBusy)
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
	// Another process, which knows nothing of the pool but locks the image, is in the way as well.
	f, err := storage.Open(filepath.Join(dir, volumesDir, v.ID, headImage), storage.ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	wantClass(t, p.Delete(t.Context(), v.ID), ErrBusy)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Get(t.Context(), v.ID); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := p.Delete(t.Context(), v.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err = p.Get(t.Context(), v.ID)
	wantClass(t, err, ErrNotFound)
	if left := tree(t, filepath.Join(dir, volumesDir)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if left := tree(t, filepath.Join(dir, tmpDir)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if again := mustCreate(t, p, "v", 2*mebibyte); again.ID == v.ID {
		t.Error("an id was used twice")
	}
}

func TestAcquireOnce(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", mebibyte)
	for _, readOnly := range []bool{false, true} {
		h, err := p.Acquire(t.Context(), v.ID, readOnly)
		if err != nil {
			t.Fatal(err)
		}
		if h.Image().ReadOnly() != readOnly {
			t.Errorf("image is read-only: %v", h.Image().ReadOnly())
		}
		_, err = p.Acquire(t.Context(), v.ID, true)
		wantClass(t, err, ErrBusy)
		if err := h.Release(); err != nil {
			t.Fatal(err)
		}
		if err := h.Release(); err != nil {
			t.Errorf("second release: %v", err)
		}
	}
	f, err := storage.Open(filepath.Join(dir, volumesDir, v.ID, headImage), storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Acquire(t.Context(), v.ID, false)
	wantClass(t, err, ErrBusy)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	stale := mustAcquire(t, p, v.ID)
	if err := stale.Release(); err != nil {
		t.Fatal(err)
	}
	fresh := mustAcquire(t, p, v.ID)
	if err := stale.Release(); err != nil { // does not touch the successor
		t.Fatal(err)
	}
	if _, err := fresh.Image().WriteAt([]byte{1}, 0); err != nil {
		t.Error(err)
	}
	wantClass(t, stale.SetFormat(t.Context(), Format{State: RawBlock}), ErrInvalid)
	if err := fresh.Release(); err != nil {
		t.Fatal(err)
	}
}

func TestExpand(t *testing.T) {
	p := newPool(t)
	for _, c := range []struct {
		name string
		open bool
	}{{"at rest", false}, {"under its users", true}} {
		t.Run(c.name, func(t *testing.T) {
			v := mustCreate(t, p, c.name, 10*mebibyte)
			var h *Handle
			if c.open {
				h = mustAcquire(t, p, v.ID)
			}
			for _, step := range []struct {
				r     SizeRange
				want  int64
				class error
			}{
				{SizeRange{Required: 10 * mebibyte}, 10 * mebibyte, nil},
				{SizeRange{Required: 5 * mebibyte}, 10 * mebibyte, nil},
				{SizeRange{}, 10 * mebibyte, nil},
				{SizeRange{Required: 5 * mebibyte, Limit: 9 * mebibyte}, 0, ErrOutOfRange},
				{SizeRange{Limit: 9 * mebibyte}, 0, ErrOutOfRange},
				{SizeRange{Required: 20*mebibyte - 1}, 20 * mebibyte, nil},
				{SizeRange{Required: 20*mebibyte - 1}, 20 * mebibyte, nil},
				{SizeRange{Required: 30*mebibyte - 1, Limit: 30*mebibyte - 1}, 0, ErrOutOfRange},
				{SizeRange{Required: 1 << 60}, 0, ErrOutOfRange},
				{SizeRange{Required: 1 << 50}, 0, ErrNoSpace},
				{SizeRange{Required: -1}, 0, ErrInvalid},
				{SizeRange{Required: 600 * mebibyte}, 600 * mebibyte, nil}, // another L1 entry
			} {
				got, err := p.Expand(t.Context(), v.ID, step.r)
				if got != step.want || !errors.Is(err, step.class) {
					t.Errorf("expand to %+v: %d, %v; want %d, %v", step.r, got, err, step.want, step.class)
				}
				if info, err := p.Get(t.Context(), v.ID); err != nil || step.class == nil && info.Size != step.want {
					t.Errorf("after %+v: %+v, %v", step.r, info, err)
				}
				if h != nil && step.class == nil && h.Image().Size() != step.want {
					t.Errorf("open image has %d bytes", h.Image().Size())
				}
			}
			if h != nil {
				if _, err := h.Image().WriteAt([]byte{9}, 600*mebibyte-1); err != nil {
					t.Error(err)
				}
				if err := h.Release(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	v := mustCreate(t, p, "read-only", mebibyte)
	h, err := p.Acquire(t.Context(), v.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Expand(t.Context(), v.ID, SizeRange{Required: 2 * mebibyte})
	wantClass(t, err, ErrBusy)
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
}

func TestFormatIsRecorded(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", mebibyte)
	for _, f := range []Format{
		{State: Formatting, Filesystem: "ext4"}, {State: Formatted, Filesystem: "ext4"}, {State: RawBlock}, {State: NeverFormatted},
	} {
		h := mustAcquire(t, p, v.ID)
		if err := h.SetFormat(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		if got := h.Volume().Format; got != f {
			t.Errorf("recorded %+v, is %+v", f, got)
		}
		for _, bad := range []Format{{}, {State: "odd"}, {State: Formatted}, {State: RawBlock, Filesystem: "ext4"}} {
			wantClass(t, h.SetFormat(t.Context(), bad), ErrInvalid)
		}
		if err := h.Release(); err != nil {
			t.Fatal(err)
		}
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		p = openPool(t, dir)
		if got, err := p.Get(t.Context(), v.ID); err != nil || got.Format != f {
			t.Errorf("recorded %+v, is %+v, %v", f, got.Format, err)
		}
	}
}

func TestDamagedVolumes(t *testing.T) {
	edit := func(file string, change func([]byte) []byte) func(dir string) error {
		return func(dir string) error {
			path := filepath.Join(dir, file)
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(path, change(b), 0o600)
		}
	}
	replace := func(old, with string) func([]byte) []byte {
		return func(b []byte) []byte { return []byte(strings.ReplaceAll(string(b), old, with)) }
	}
	for name, c := range map[string]struct {
		damage func(dir string) error
		class  error
	}{
		"torn record":        {edit(volumeFile, func(b []byte) []byte { return b[:len(b)/2] }), ErrCorrupt},
		"empty record":       {edit(volumeFile, func([]byte) []byte { return nil }), ErrCorrupt},
		"newer record":       {edit(volumeFile, replace(`"version": 1`, `"version": 7`)), ErrUnsupported},
		"unknown field":      {edit(volumeFile, replace(`"name"`, `"title"`)), ErrCorrupt},
		"record of another":  {edit(volumeFile, replace(`"id": "`, `"id": "x`)), ErrCorrupt},
		"wild head":          {edit(volumeFile, replace(headImage, "../../../head.qcow2")), ErrCorrupt},
		"unknown format":     {edit(volumeFile, replace(string(NeverFormatted), "odd")), ErrCorrupt},
		"no record":          {func(dir string) error { return os.Remove(filepath.Join(dir, volumeFile)) }, ErrCorrupt},
		"no image":           {func(dir string) error { return os.Remove(filepath.Join(dir, headImage)) }, ErrCorrupt},
		"truncated image":    {edit(headImage, func(b []byte) []byte { return b[:50] }), ErrCorrupt},
		"another format":     {edit(headImage, func(b []byte) []byte { return append([]byte("KDMV"), b[4:]...) }), ErrCorrupt},
		"newer qcow2":        {edit(headImage, func(b []byte) []byte { b[7] = 4; return b }), ErrUnsupported},
		"image is a symlink": {func(dir string) error { return relink(filepath.Join(dir, headImage)) }, ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			p := openPool(t, dir)
			sick, well := mustCreate(t, p, "sick", mebibyte), mustCreate(t, p, "well", mebibyte)
			fill(t, p, sick.ID, 3, 1000)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			home := filepath.Join(dir, volumesDir, sick.ID)
			backup := t.TempDir()
			if err := os.CopyFS(backup, os.DirFS(home)); err != nil {
				t.Fatal(err)
			}
			if err := c.damage(home); err != nil {
				t.Fatal(err)
			}
			damaged := tree(t, home)

			p = openPool(t, dir)
			_, err := p.Get(t.Context(), sick.ID)
			wantClass(t, err, c.class)
			if _, err := p.Acquire(t.Context(), sick.ID, false); err == nil {
				t.Error("acquired")
			}
			if _, err := p.Expand(t.Context(), sick.ID, SizeRange{Required: 2 * mebibyte}); err == nil {
				t.Error("expanded")
			}
			if ids := list(t, p); len(ids) != 2 {
				t.Errorf("listed: %v", ids)
			}
			fill(t, p, well.ID, 4, 1000)
			mustCreate(t, p, "another", mebibyte)
			if _, err := p.Capacity(t.Context()); err != nil {
				t.Error(err)
			}
			if now := tree(t, home); !slices.Equal(now, damaged) {
				t.Errorf("was %v, is %v", damaged, now)
			}

			// Repaired, it works again at once.
			if err := os.RemoveAll(home); err != nil {
				t.Fatal(err)
			}
			if err := os.CopyFS(home, os.DirFS(backup)); err != nil {
				t.Fatal(err)
			}
			expect(t, p, sick.ID, 3, 1000)
			if v := mustCreate(t, p, "sick", mebibyte); v.ID != sick.ID {
				t.Errorf("the name now means %s", v.ID)
			}

			// Whoever wants it gone gets it gone, damaged as it is.
			if err := c.damage(home); err != nil {
				t.Fatal(err)
			}
			if err := p.Delete(t.Context(), sick.ID); err != nil {
				t.Error(err)
			}
			if ids := list(t, p); slices.Contains(ids, sick.ID) {
				t.Errorf("listed: %v", ids)
			}
		})
	}
}

// relink moves a file and leaves a symbolic link to it.
func relink(path string) error {
	if err := os.Rename(path, path+".moved"); err != nil {
		return err
	}
	return os.Symlink(filepath.Base(path)+".moved", path)
}

func TestStrangersAmongVolumes(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", mebibyte)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	volumes := filepath.Join(dir, volumesDir)
	for _, err := range []error{
		os.WriteFile(filepath.Join(volumes, "notes.txt"), nil, 0o600),
		os.Mkdir(filepath.Join(volumes, "Not An Id"), 0o700),
		os.Symlink(v.ID, filepath.Join(volumes, "alias")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	before := tree(t, volumes)
	p = openPool(t, dir)
	if ids := list(t, p); len(ids) != 1 || ids[0] != v.ID {
		t.Errorf("volumes: %v", ids)
	}
	_, err := p.Acquire(t.Context(), "alias", false)
	wantClass(t, err, ErrNotFound)
	if after := tree(t, volumes); !slices.Equal(before, after) {
		t.Errorf("was %v, is %v", before, after)
	}
}

func TestTwoVolumesOfOneName(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "v", mebibyte)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	// As an administrator leaves it who has restored a copy beside the original.
	copied := filepath.Join(dir, volumesDir, "v-copy")
	if err := os.CopyFS(copied, os.DirFS(filepath.Join(dir, volumesDir, v.ID))); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(copied, volumeFile))
	if err != nil {
		t.Fatal(err)
	}
	b = []byte(strings.Replace(string(b), v.ID, "v-copy", 1))
	b = []byte(strings.Replace(string(b), fmt.Sprintf("%q: \"2", "created"), fmt.Sprintf("%q: \"3", "created"), 1))
	if err := os.WriteFile(filepath.Join(copied, volumeFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir)
	if ids := list(t, p); len(ids) != 2 {
		t.Errorf("volumes: %v", ids)
	}
	if got := mustCreate(t, p, "v", mebibyte); got.ID != "v-copy" {
		t.Errorf("the name means %s", got.ID)
	}
	if err := p.Delete(t.Context(), "v-copy"); err != nil {
		t.Fatal(err)
	}
	if got := mustCreate(t, p, "v", mebibyte); got.ID != v.ID {
		t.Errorf("the name means %s", got.ID)
	}
}

func TestHandleSeesTheImage(t *testing.T) {
	p := newPool(t)
	v := mustCreate(t, p, "v", mebibyte)
	h := mustAcquire(t, p, v.ID)
	var _ *qcow.Image = h.Image()
	if h.Image().Info().Allocated {
		t.Error("a new volume holds data")
	}
	if _, err := h.Image().WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if !h.Image().Info().Allocated {
		t.Error("a written volume holds none")
	}
	if err := h.Release(); err != nil {
		t.Fatal(err)
	}
}
