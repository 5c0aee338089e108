package serve

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"strings"

	"tidemark/internal/filter/cow"
	"tidemark/internal/front/nbd"
	"tidemark/internal/health"
	"tidemark/internal/snapshot"
)

// image is an image of a snapshot that is shown.
type image struct {
	spec   Spec
	device string
	served served
}

// imageDevice is an image with every ability that fronts use.
type imageDevice struct{ *cow.Image }

// WriteFUA writes, and makes the image as stable as its storage is.
func (i imageDevice) WriteFUA(p []byte, off int64) (int, error) {
	n, err := i.WriteAt(p, off)
	if err == nil {
		err = i.Flush()
	}
	return n, err
}

// showImages shows every image of a snapshot by the front of its device.
func (s *Server) showImages(ctx context.Context, id snapshot.ID) error {
	images, err := s.set.Images(id)
	if err != nil {
		return err
	}
	var errs []error
	for _, i := range images {
		if err := s.showImage(ctx, id, i); err != nil {
			errs = append(errs, fmt.Errorf("the image of %s: %w", i.Device, err))
		}
	}
	return errors.Join(errs...)
}

func (s *Server) showImage(ctx context.Context, id snapshot.ID, i snapshot.ImageOf) error {
	d, err := s.find(i.Device)
	if err != nil {
		return err
	}
	now := d.now()
	name := imageName(i.Device, id)
	key := sha256.Sum256([]byte(now.spec.ID + " " + name))
	spec := Spec{Name: name, Backing: now.spec.Backing, Front: now.spec.Front, ID: hex.EncodeToString(key[:8])}
	var memory json.RawMessage
	if r, err := s.load(name); err == nil {
		memory = r.Memory
	}
	show := shown{imageDevice{i.Image}, now.lower.Limits(), nil}
	if c := i.Changes; c != nil {
		show.bitmaps = func() (out []nbd.Bitmap) {
			for n := 1; n < int(c.Info().Number); n++ {
				if since, err := c.Since(c.Info().Generation, uint8(n)); err == nil {
					out = append(out, nbd.Bitmap{Name: fmt.Sprintf("since-%d", n), Map: runsOf(since)})
				}
			}
			return out
		}
	}
	served, err := s.front(spec.Front).serve(ctx, spec, show, memory)
	if err != nil {
		return err
	}
	m := &image{spec, i.Device, served}
	if err := errors.Join(s.save(record{Spec: spec, Made: true, Memory: served.memory()}), s.linkTo(name, served)); err != nil {
		return errors.Join(err, served.end(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[name] = m
	return nil
}

// OnImages has f called each time when images of snapshots were shown or taken
// away, whoever asked for it, before that is answered. nil: nobody is told any more.
func (s *Server) OnImages(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = f
}

func (s *Server) tellOfImages() {
	s.mu.Lock()
	f := s.seen
	s.mu.Unlock()
	if f != nil {
		f()
	}
}

func (s *Server) imagesOffline(id string, err error) {
	s.health.Raise(health.Condition{Code: "image-offline", Severity: health.Error, Subject: id, Detail: err.Error(),
		Remedy: "Start the daemon again when what it names is mended, or: tidemark snapshot destroy " + id + "."})
}

func imageName(device string, id snapshot.ID) string {
	return device + "@" + snapshot.FormatID(id)
}

// ImageNode is where users find a device's image, "" where it is not shown.
func (s *Server) ImageNode(device string, id string) string {
	s.mu.Lock()
	m := s.images[device+"@"+id]
	s.mu.Unlock()
	if m == nil {
		return ""
	}
	if m.served.kernel() == "" {
		return m.served.uri()
	}
	return filepath.Join(s.env.Nodes, m.spec.Name)
}

// bringBackImages shows the images of snapshots that go on, and takes away what
// is left of others.
func (s *Server) bringBackImages(ctx context.Context) {
	wanted := map[string]bool{}
	for _, i := range s.set.List() {
		id, err := snapshot.ParseID(i.ID)
		if err != nil {
			continue
		}
		s.followEvents(id)
		if i.State == "created" {
			continue
		}
		if err := s.showImages(ctx, id); err != nil {
			s.imagesOffline(i.ID, err)
		}
		// Of a spoiled one that is not shown requests of before must not wait.
		for _, d := range i.Devices {
			name := imageName(d.Name, id)
			wanted[name] = i.State != "spoiled" || s.images[name] != nil
		}
	}
	left, _ := filepath.Glob(filepath.Join(s.folder, "*@*"+recordSuffix)) // a pattern without faults
	for _, path := range left {
		name := strings.TrimSuffix(filepath.Base(path), recordSuffix)
		if r, err := s.load(name); err == nil && !wanted[name] {
			err := s.front(r.Spec.Front).forget(ctx, r.Spec, r.Memory)
			if err == nil {
				err = errors.Join(s.unlinkName(name), s.erase(name))
			}
			if err != nil { // the next start tries again
				s.env.Log.Warn("what is left of an image", "image", name, "error", err)
			}
		}
	}
	s.watching.Go(func() { s.watchLate(s.watch0) }) // from here on: everything is open
	s.watching.Go(s.set.Settle)
}

func (s *Server) endImage(ctx context.Context, name string) error {
	s.mu.Lock()
	m := s.images[name]
	delete(s.images, name)
	s.mu.Unlock()
	if m == nil {
		return nil
	}
	err := errors.Join(s.unlinkName(name), m.served.end(ctx))
	if l, ok := m.served.(lingerer); ok && !closed(l.lingers()) {
		// Remembered as long as the kernel has it: if this process is killed, the next one forgets it.
		s.watching.Go(func() {
			select {
			case <-l.lingers():
				if err := s.erase(name); err != nil {
					s.env.Log.Warn("what is left of an image", "image", name, "error", err)
				}
			case <-s.watch0.Done():
			}
		})
		return err
	}
	return errors.Join(err, s.erase(name))
}

// lingerer is served by a front whose devices end with their last user.
type lingerer interface {
	lingers() <-chan struct{} // closed when it is gone
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// pauseImages lets go of the images, before their devices.
func (s *Server) pauseImages(ctx context.Context) error {
	s.mu.Lock()
	images := s.images
	s.images = map[string]*image{}
	s.mu.Unlock()
	var errs []error
	for name, m := range images {
		errs = append(errs, m.served.pause(ctx))
		if !m.served.outlives() {
			errs = append(errs, s.unlinkName(name))
		}
	}
	return errors.Join(errs...)
}

// imagesInUse lists the images that somebody has open.
func (s *Server) imagesInUse() (out []string) {
	s.mu.Lock()
	images := maps.Clone(s.images)
	s.mu.Unlock()
	for name, m := range images {
		if m.served.open() {
			out = append(out, name)
		}
	}
	return out
}
