package daemon

import (
	"context"
	"time"

	"tidemark/internal/control/api"
	"tidemark/internal/health"
	"tidemark/internal/protect"
)

// openMarks finds the commits that an earlier daemon decided and did not end.
func (s *service) openMarks(step func(string)) error {
	ledger, damaged, err := protect.OpenLedger(s.env.StateDir, step)
	if err != nil {
		return unusable(err)
	}
	for _, err := range damaged {
		s.health.Raise(health.Condition{Code: "mark-verdict-damaged", Severity: health.Error, Subject: s.env.StateDir,
			Detail: "The verdict on a bookmark over several groups cannot be read: " + err.Error() + ". Groups that have not had it yet take the bookmark for revoked.",
			Remedy: "Look which of the groups offer the bookmark (tidemark points), and use it only if all do; then remove the file."})
	}
	s.env.Ledger = ledger
	return nil
}

// MarkGroups puts a bookmark over groups, or prepares it.
func (s *service) MarkGroups(ctx context.Context, r api.MarkGroupsRequest) (api.Mark, error) {
	var groups []*protect.Group
	for _, name := range r.Groups {
		g, err := s.find(name)
		if err != nil {
			return api.Mark{}, err
		}
		groups = append(groups, g)
	}
	req := protect.MarkRequest{Name: r.Name, Consistency: r.Consistency, Barrier: protect.Barrier(r.Barrier), Within: time.Duration(r.TimeoutMillis) * time.Millisecond}
	put, state := s.env.Ledger.Bookmark, api.MarkCommitted
	if r.Prepare {
		put, state = s.env.Ledger.Prepare, api.MarkPrepared
	}
	p, err := put(ctx, groups, req)
	if err != nil {
		return api.Mark{}, coded(err)
	}
	return markOf(p, state), nil
}

// Marks lists the marks that wait for a verdict.
func (s *service) Marks(context.Context) ([]api.Mark, error) {
	out := []api.Mark{}
	for _, p := range s.env.Ledger.Pending() {
		out = append(out, markOf(p, api.MarkPrepared))
	}
	return out, nil
}

func (s *service) CommitMark(ctx context.Context, name string) (api.Mark, error) {
	p, err := s.env.Ledger.Commit(context.WithoutCancel(ctx), name)
	if err != nil {
		return api.Mark{}, coded(err)
	}
	return markOf(p, api.MarkCommitted), nil
}

func (s *service) RevokeMark(ctx context.Context, name string) error {
	return coded(s.env.Ledger.Revoke(context.WithoutCancel(ctx), name))
}

func markOf(p protect.Prepared, state api.MarkState) api.Mark {
	out := api.Mark{Name: p.Name, State: state, Consistency: p.Consistency, HeldSeconds: p.Held.Seconds(), Groups: []api.MarkedGroup{}}
	if state == api.MarkPrepared {
		out.Until = p.Until.UTC()
	}
	for _, g := range p.Groups {
		out.Groups = append(out.Groups, api.MarkedGroup{Group: g.Group, Position: g.Position, Time: g.Time.UTC(), Barrier: string(g.Barrier)})
	}
	return out
}
