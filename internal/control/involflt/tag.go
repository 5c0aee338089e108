package involflt

import (
	"context"
	"slices"
	"syscall"
	"time"

	"tidemark/internal/abi/involflt"
)

// tagCall is one TAG_VOLUME_V2 or IOBARRIER_TAG_VOLUME.
type tagCall struct {
	in      involflt.TagInfo
	tags    [][]byte
	list    []involflt.VolumeInfo // none where all disks are meant
	barrier bool                  // IOBARRIER_TAG_VOLUME: with a barrier of its own
	disks   []*disk               // that get it
	missing bool                  // some do not
}

// all says whether all disks are meant, whatever the list says.
func (t *tagCall) all() bool { return t.in.Flags&involflt.AllVolumes != 0 }

// final says whether the tag needs no verdict.
func (t *tagCall) final() bool {
	return t.barrier && !slices.ContainsFunc(t.list, func(v involflt.VolumeInfo) bool { return v.Flags&involflt.DrainBarrier != 0 })
}

// readTag reads a call, and refuses what is wrong in itself.
func readTag(arg uint64, m memory, barrier bool) (*tagCall, error) {
	t := &tagCall{barrier: barrier}
	if err := get(m, arg, &t.in); err != nil {
		return nil, err
	}
	if t.in.Tags < 1 || t.in.Tags > tagsMax || barrier && t.in.Timeout < 0 {
		return nil, syscall.EINVAL
	}
	tags := make([]involflt.Tag, t.in.Tags)
	if err := get(m, t.in.TagArray, tags); err != nil {
		return nil, err
	}
	for i := range tags {
		if tags[i].Length > involflt.TagMax {
			return nil, syscall.EPERM
		}
		t.tags = append(t.tags, tags[i].Data[:tags[i].Length])
	}
	if len(involflt.UserRecords(t.tags)) > involflt.TagRecordsMax-4 {
		return nil, syscall.EINVAL
	}
	if t.all() {
		return t, nil
	}
	var err error
	t.list, err = volumes(m, t.in.Array, t.in.Volumes)
	return t, err
}

// tag puts a mark into the order of the disks that are named, those that can have it.
func (s *Server) tag(ctx context.Context, arg uint64, m memory, barrier bool) (int32, error) {
	t, err := readTag(arg, m, barrier)
	if err != nil {
		return 0, err
	}
	if err := s.gate.enter(ctx); err != nil {
		return 0, err
	}
	defer s.gate.leave()
	if err := s.mayTag(t); err != nil {
		return 0, err
	}
	refused := s.choose(t)
	if len(t.disks) == 0 {
		if err := putStatus(m, t); err != nil {
			return 0, err
		}
		return 0, refused
	}
	if err := s.mark(ctx, t); err != nil {
		s.trouble("no mark", "error", err)
		for i := range t.list {
			t.list[i].Status |= involflt.StatusNotAccepted
		}
		if err := putStatus(m, t); err != nil {
			return 0, err
		}
		return 0, err
	}
	if err := putStatus(m, t); err != nil { // it could be written before, and the mark is made
		s.trouble("the status of a tag cannot be told", "error", err)
	}
	if t.missing {
		return involflt.PartialTags, nil
	}
	return 0, nil
}

func putStatus(m memory, t *tagCall) error {
	if len(t.list) == 0 {
		return nil
	}
	return put(m, t.in.Array, t.list)
}

// mayTag says whether the point's state lets a tag in. Called within the gate.
func (s *Server) mayTag(t *tagCall) error {
	p := &s.point
	timeout := t.in.Timeout >= 1 && t.in.Timeout <= involflt.TimeoutMax
	switch {
	case t.barrier && !p.none():
		return syscall.EAGAIN
	case t.barrier && !t.final() && !timeout:
		return syscall.EINVAL
	case t.barrier:
		return nil
	case p.none() && (t.all() || !timeout):
		return syscall.EINVAL
	case p.none():
		return nil
	case p.guid != t.in.GUID, p.tagged != nil, t.all() && (p.release == nil || len(p.frozen) > 0):
		return syscall.EINVAL
	}
	return nil
}

// choose finds the disks that get the tag; refused is the answer if none does.
func (s *Server) choose(t *tagCall) (refused error) {
	if t.all() {
		all := s.all()
		refused = syscall.ENODEV
		for _, d := range all {
			if d.inOrder() {
				t.disks = append(t.disks, d)
			} else {
				t.missing, refused = true, syscall.EAGAIN
			}
		}
		if t.barrier && t.missing { // as its barrier would be refused
			t.disks, refused = nil, syscall.EPERM
		}
		return refused
	}
	refused = syscall.EPERM
	for i := range t.list {
		device, _ := t.list[i].Device.String()
		d := s.byDevice(device)
		switch {
		case d == nil:
			t.list[i].Status, t.missing = involflt.StatusNotProtected, true
		case !d.inOrder():
			t.list[i].Status, t.missing = involflt.StatusNotInOrder, true
			refused = syscall.EAGAIN // it may be soon
		case !slices.Contains(t.disks, d):
			t.disks = append(t.disks, d)
		}
	}
	return refused
}

// mark makes it, and leaves the point waiting for its verdict. Called within the gate.
func (s *Server) mark(ctx context.Context, t *tagCall) error {
	p := &s.point
	verdict := verdictTime
	if t.in.Timeout >= 1 && t.in.Timeout <= involflt.TimeoutMax {
		verdict = time.Duration(t.in.Timeout) * time.Millisecond
	}
	mark := Mark{GUID: string(t.in.GUID[:]), Tags: t.tags}
	w := &tagged{disks: t.disks}
	for _, d := range t.disks {
		mark.Devices = append(mark.Devices, d.device)
		w.lost = append(w.lost, d.tagless.Load())
	}
	if !t.final() {
		mark.Until = time.Now().Add(verdict)
	}
	var err error
	if w.marked, err = s.system.Mark(ctx, mark); err != nil {
		return err
	}
	if !t.final() {
		if p.none() {
			s.begin(t.in.GUID)
		}
		p.tagged = w
		p.verdictTimer = s.after(verdict, "nobody gave a verdict on its tags")
	}
	for _, d := range t.disks {
		d.wake()
	}
	return nil
}

// verdict commits or revokes the tags of the point. 1: some of them are gone, with all that was pending.
func (s *Server) verdict(ctx context.Context, arg uint64, m memory) (int32, error) {
	var in involflt.TagVerdict
	if err := get(m, arg, &in); err != nil {
		return 0, err
	}
	if in.Verdict > involflt.Commit {
		return 0, syscall.EINVAL
	}
	if err := s.gate.enter(ctx); err != nil {
		return 0, err
	}
	defer s.gate.leave()
	p := &s.point
	t := p.tagged
	if t == nil || p.guid != in.GUID || len(p.frozen) > 0 || p.release != nil {
		return 0, syscall.EINVAL
	}
	if in.Verdict == involflt.Revoke {
		s.dissolve("its tags were revoked")
		return 0, nil
	}
	if p.broken {
		s.dissolve("a file system did not stay frozen")
		return 0, syscall.EINVAL
	}
	if err := t.marked.Commit(ctx); err != nil {
		s.trouble("a mark cannot be committed", "error", err)
		if ctx.Err() == nil {
			s.dissolve("its tags could not be committed")
			return 0, syscall.EINVAL
		}
		return 0, err
	}
	s.over()
	result := int32(0)
	for i, d := range t.disks {
		if d.tagless.Load() != t.lost[i] {
			result = involflt.PartialTags
			d.counted(func(c *counters) { c.TagsLost++ })
		}
		d.wake()
	}
	return result, nil
}
