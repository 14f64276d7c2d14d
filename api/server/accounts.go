package server

import (
	"context"
	"slices"

	"connectrpc.com/connect"

	"github.com/musternet/muster/api"
	"github.com/musternet/muster/api/musterpb"
	"github.com/musternet/muster/scheduler/ledger"
	"github.com/musternet/muster/scheduler/state"
)

// ListWorkers implements Muster. Everybody sees every worker: what is offered,
// at what price. Records and earnings are the owner's own.
func (s *Server) ListWorkers(ctx context.Context, req *connect.Request[musterpb.ListWorkersRequest]) (*connect.Response[musterpb.ListWorkersResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	connected := s.Scheduler.Connected()
	running := map[string][]string{}
	for _, a := range s.State.LiveAttempts() {
		running[a.Worker] = append(running[a.Worker], a.Id)
	}
	out := &musterpb.ListWorkersResponse{}
	for _, w := range s.State.Workers() {
		if req.Msg.Worker != "" && req.Msg.Worker != w.Id && req.Msg.Worker != w.Name {
			continue
		}
		status := &musterpb.WorkerStatus{Worker: w, Connected: connected[w.Id]}
		if w.Owner == caller(ctx).Account || isAdmin(ctx) {
			// Nobody else's to know: who starts right after a result was committed
			// may well be checking it.
			status.Running = running[w.Id]
			status.Records = s.State.Records(w.Owner)
			status.EarnedMicroUsd = s.State.Balance(w.Owner).EarnedMicroUsd
		}
		out.Workers = append(out.Workers, status)
	}
	if req.Msg.Worker != "" && len(out.Workers) == 0 {
		return nil, api.Errorf(api.NotFound, "worker %q is not known; muster worker list shows all", req.Msg.Worker)
	}
	return connect.NewResponse(out), nil
}

// DrainWorker implements Muster.
func (s *Server) DrainWorker(ctx context.Context, req *connect.Request[musterpb.DrainWorkerRequest]) (*connect.Response[musterpb.DrainWorkerResponse], error) {
	w := s.State.Worker(req.Msg.Worker)
	if w == nil {
		return nil, api.Errorf(api.NotFound, "worker %q is not known; muster worker list shows all", req.Msg.Worker)
	}
	if _, err := accountFor(ctx, w.Owner, true); err != nil {
		return nil, err
	}
	cmd := &musterpb.DrainWorker{Worker: w.Id, Draining: !req.Msg.Resume}
	if _, err := s.Scheduler.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_DrainWorker{DrainWorker: cmd}}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.DrainWorkerResponse{}), nil
}

// CreateAccount implements Muster. For an account that exists it makes one
// more key.
func (s *Server) CreateAccount(ctx context.Context, req *connect.Request[musterpb.CreateAccountRequest]) (*connect.Response[musterpb.CreateAccountResponse], error) {
	if err := adminsOnly(ctx, "create accounts and keys"); err != nil {
		return nil, err
	}
	if err := state.CheckAccountName(req.Msg.Account); err != nil {
		return nil, err
	}
	if !s.State.HasAccount(req.Msg.Account) {
		cmd := &musterpb.CreateAccount{Account: req.Msg.Account}
		if _, err := s.Scheduler.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_CreateAccount{CreateAccount: cmd}}); err != nil {
			return nil, err
		}
	}
	role := req.Msg.Role
	if role == musterpb.Role_ROLE_UNSPECIFIED {
		role = musterpb.Role_ROLE_CUSTOMER
	}
	key, hash := NewKey(req.Msg.Account)
	cmd := &musterpb.CreateKey{Account: req.Msg.Account, Hash: hash, Role: role}
	if _, err := s.Scheduler.Propose(ctx, &musterpb.Command{Body: &musterpb.Command_CreateKey{CreateKey: cmd}}); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.CreateAccountResponse{Key: key}), nil
}

// GetAccount implements Muster.
func (s *Server) GetAccount(ctx context.Context, req *connect.Request[musterpb.GetAccountRequest]) (*connect.Response[musterpb.GetAccountResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	out := &musterpb.GetAccountResponse{}
	if req.Msg.Account == "*" {
		if err := adminsOnly(ctx, "see every account"); err != nil {
			return nil, err
		}
		for _, account := range s.State.Accounts() {
			out.Balances = append(out.Balances, s.State.Balance(account))
		}
		for _, name := range []string{ledger.Network, ledger.External} {
			a := s.State.LedgerAccount(name)
			out.Balances = append(out.Balances, &musterpb.Balance{Account: "(" + name + ")", BalanceMicroUsd: int64(a.Balance), HeldMicroUsd: int64(a.Held)})
		}
		return connect.NewResponse(out), nil
	}
	account, err := accountFor(ctx, req.Msg.Account, false)
	if err != nil {
		return nil, err
	}
	if !s.State.HasAccount(account) {
		return nil, api.Errorf(api.NotFound, "account %q does not exist", account)
	}
	out.Balances = append(out.Balances, s.State.Balance(account))
	return connect.NewResponse(out), nil
}

// Deposit implements Muster.
func (s *Server) Deposit(ctx context.Context, req *connect.Request[musterpb.DepositRequest]) (*connect.Response[musterpb.DepositResponse], error) {
	if err := adminsOnly(ctx, "enter deposits"); err != nil {
		return nil, err
	}
	if err := checkRequestID(req.Msg.Id); err != nil {
		return nil, err
	}
	account, err := accountFor(ctx, req.Msg.Account, true)
	if err != nil {
		return nil, err
	}
	cmd := &musterpb.Command{Id: "deposit " + req.Msg.Id, Body: &musterpb.Command_Deposit{Deposit: &musterpb.Deposit{
		Account: account, AmountMicroUsd: req.Msg.AmountMicroUsd, Memo: req.Msg.Memo,
	}}}
	if _, err := s.Scheduler.Propose(ctx, cmd); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.DepositResponse{BalanceMicroUsd: s.State.Balance(account).BalanceMicroUsd}), nil
}

// DepositMany implements Muster.
func (s *Server) DepositMany(ctx context.Context, req *connect.Request[musterpb.DepositManyRequest]) (*connect.Response[musterpb.DepositManyResponse], error) {
	if err := adminsOnly(ctx, "enter deposits"); err != nil {
		return nil, err
	}
	if err := checkRequestID(req.Msg.Id); err != nil {
		return nil, err
	}
	cmd := &musterpb.Command{Id: "deposits " + req.Msg.Id, Body: &musterpb.Command_Deposits{Deposits: &musterpb.Deposits{Deposits: req.Msg.Deposits}}}
	if _, err := s.Scheduler.Propose(ctx, cmd); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.DepositManyResponse{}), nil
}

// maxTransfers bounds one page of transfers.
const maxTransfers = 1000

// ListTransfers implements Muster.
func (s *Server) ListTransfers(ctx context.Context, req *connect.Request[musterpb.ListTransfersRequest]) (*connect.Response[musterpb.ListTransfersResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	var account string
	if req.Msg.All {
		if err := adminsOnly(ctx, "see every transfer"); err != nil {
			return nil, err
		}
	} else {
		var err error
		if account, err = accountFor(ctx, req.Msg.Account, false); err != nil {
			return nil, err
		}
	}
	list, more, err := s.transfers(ctx, account, req.Msg.After)
	if err != nil {
		return nil, err
	}
	out := &musterpb.ListTransfersResponse{Transfers: slices.Clone(list), More: more} // the state's own stay as they are
	for i, t := range out.Transfers {
		if t.Kind == musterpb.TransferKind_TRANSFER_KIND_HOLD && t.Credit == ledger.Of(account) && s.State.HoldOpen(t.Id) {
			// Who pays would tell the worker, while it works, whether it checks a dispute.
			out.Transfers[i] = t.CloneVT()
			out.Transfers[i].Debit = "(withheld until the attempt is over)"
		}
	}
	return connect.NewResponse(out), nil
}

// ClusterStatus implements Muster.
func (s *Server) ClusterStatus(ctx context.Context, req *connect.Request[musterpb.ClusterStatusRequest]) (*connect.Response[musterpb.ClusterStatusResponse], error) {
	if err := s.read(req); err != nil {
		return nil, err
	}
	leader, _ := s.Scheduler.Leader()
	out := &musterpb.ClusterStatusResponse{
		Cluster: s.State.Cluster(), Leader: string(leader), Term: s.Cluster.Term(), AppliedIndex: s.Cluster.Applied(),
		WorkersConnected: uint32(len(s.Scheduler.Connected())), JobsLive: uint32(s.State.LiveJobs()), AttemptsLive: uint32(len(s.State.LiveAttempts())),
		Epoch: s.State.Epoch(), LedgerSumMicroUsd: int64(s.State.LedgerSum()),
	}
	for _, segment := range s.State.Segments() {
		out.Segments++
		out.SealedBytes += segment.Bytes
		out.SealedJobs += segment.Jobs
	}
	if isAdmin(ctx) { // it costs a pass over the whole state
		out.StateHash = s.State.Snapshot().Hash()
	}
	committee := 0
	for _, n := range s.State.Nodes() {
		in := len(n.Tip) > 0
		if in {
			committee++
		}
		out.Nodes = append(out.Nodes, &musterpb.NodeStatus{
			Id: n.Id, ApiAddress: n.ApiAddress, RaftAddress: n.RaftAddress, Leader: n.Id == string(leader), InCommittee: in, Note: n.LeftReason,
		})
	}
	switch committee {
	case 0:
		out.Randomness = "nobody draws: every result is checked in full"
	case 1:
		out.Randomness = "this cluster's operator alone draws the samples (a single scheduler)"
	default:
		out.Randomness = "a committee draws the samples; no single scheduler can predict or bend them"
	}
	return connect.NewResponse(out), nil
}

// sessionService answers workers.
type sessionService Server

// Session implements Sessions.
func (s *sessionService) Session(ctx context.Context, stream *connect.BidiStream[musterpb.WorkerMessage, musterpb.SchedulerMessage]) error {
	key := caller(ctx)
	if key.Role == musterpb.Role_ROLE_READER {
		return api.Errorf(api.Denied, "a reader key may not run workers")
	}
	if id, address := (*Server)(s).awaitLeader(ctx); id != s.Scheduler.ID() {
		err := connect.NewError(connect.CodeUnavailable, errNotLeader)
		err.Meta().Set(leaderHeader, address)
		return err
	}
	return s.Cluster.Session(ctx, key.Account, stream)
}

// peerService answers the other schedulers.
type peerService Server

// Join implements Peers. The caller shows an admin's key, and the node signs
// for itself.
func (s *peerService) Join(ctx context.Context, req *connect.Request[musterpb.JoinRequest]) (*connect.Response[musterpb.JoinResponse], error) {
	key, err := (*Server)(s).authenticate(req.Header().Get("Authorization"))
	if err != nil {
		return nil, err
	}
	if key.Role != musterpb.Role_ROLE_ADMIN {
		return nil, api.Errorf(api.Denied, "only an admin key may add a scheduler to the cluster")
	}
	if err := CheckJoin(req.Msg); err != nil {
		return nil, err
	}
	if err := s.Cluster.Join(ctx, req.Msg.Node); err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.JoinResponse{Cluster: s.State.Cluster()}), nil
}

// Propose implements Peers; the proposal is signed by the node that makes it.
func (s *peerService) Propose(ctx context.Context, req *connect.Request[musterpb.ProposeRequest]) (*connect.Response[musterpb.ProposeResponse], error) {
	answer, err := s.Cluster.ProposeForNode(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&musterpb.ProposeResponse{Answer: answer}), nil
}
